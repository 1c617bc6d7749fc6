"""`lamina diff`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamina.cli.app import app
from tests.stages.chains import llama_lora, run_chain


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run_chain(
        tmp_path,
        [
            ("domain", None, llama_lora()),
            ("chat", "stack", llama_lora(r=6, target_modules=["q_proj"])),
        ],
    )
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    told = CliRunner().invoke(app, ["diff", *map(str, arguments)], env={"COLUMNS": "100"})
    return told.exit_code, told.output


def test_a_line_for_each_kind_of_module(runs: Path) -> None:
    code, told = run(runs / "domain", runs / "chat")
    assert code == 0
    assert "domain → chat, rank 4-10" in told
    (line,) = (line for line in told.splitlines() if line.startswith("q_proj"))
    assert line.split()[1] == "2"
    assert "A and the change" in told


def test_a_line_for_each_module(runs: Path) -> None:
    code, told = run(runs / "domain", runs / "chat", "--all")
    assert code == 0
    assert sum("q_proj" in line for line in told.splitlines()) >= 2


def test_json_and_a_plot(runs: Path) -> None:
    code, told = run(
        f"{runs / 'chat'}#domain", runs / "chat", "--json", "--plot", runs / "change.png"
    )
    assert code == 0
    found = json.loads(told)
    assert {each["module"].rpartition(".")[2] for each in found["modules"]} == {"q_proj", "v_proj"}
    assert Path(found["plot"]).exists()


def test_an_error_is_one_message_with_exit_code_2(runs: Path) -> None:
    code, told = run(runs / "domian", runs / "chat")
    assert code == 2
    assert "Traceback" not in told
