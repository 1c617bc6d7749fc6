"""`lamina demo` turns its options into one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.made import lamina


def test_options_become_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(
        "lamina.demo.run.run_demo", lambda *args, **options: calls.append((args, options))
    )
    assert lamina("demo").exit_code == 0
    assert lamina("demo", "--model", "m", "-o", "x", "--steps", 3, "--seed", 5).exit_code == 0
    usual = {"model_name_or_path": None, "steps": None, "seed": 0}
    given = {"model_name_or_path": "m", "steps": 3, "seed": 5}
    assert calls == [((Path("runs/demo"),), usual), ((Path("x"),), given)]


def test_no_steps_are_refused() -> None:
    assert lamina("demo", "--steps", 0).exit_code == 2
