"""`lamina demo` turns its options into one call."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.made import lamina, write_chain


def test_options_become_the_call_and_the_result_is_inspected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    write_chain(tmp_path / "chat")

    def run_demo(*args: Any, **options: Any) -> SimpleNamespace:
        calls.append((args, options))
        return SimpleNamespace(stages={"domain": "elsewhere", "chat": str(tmp_path / "chat")})

    monkeypatch.setattr("lamina.demo.run.run_demo", run_demo)
    result = lamina("demo")
    assert result.exit_code == 0
    assert "laminated adapter, 3 stages" in result.output
    assert lamina("demo", "--model", "m", "-o", "x", "--steps", 3, "--seed", 5).exit_code == 0
    usual = {"model_name_or_path": None, "steps": None, "seed": 0}
    given = {"model_name_or_path": "m", "steps": 3, "seed": 5}
    assert calls == [((Path("runs/demo"),), usual), ((Path("x"),), given)]


def test_no_steps_are_refused() -> None:
    assert lamina("demo", "--steps", 0).exit_code == 2


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = lamina("demo", "--model", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "no such directory" in result.stderr


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    result = lamina("demo", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "can't be made a directory" in result.stderr
