"""Names from files can't drive the terminal: they are shown with escapes, wherever they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from lamina.checkpoint.adapter import write_adapter
from lamina.cli.app import app
from lamina.cli.terminal import console, facts, table
from lamina.stages import lineage
from tests.stages.chains import WEIGHTS, llama_lora, run_stage

# Clears the screen, sets the title, rings, hides what follows, writes from right to left.
HOSTILE = "\x1b[2J\x1b]0;mine\x07 x \u202e evil \u2066 \x9b31m \r over"
VERBS = (["inspect"], ["lineage"], ["doctor"], ["verify"], ["flatten", "-o", "OUT"])


def obeyed(text: str) -> list[str]:
    """What a terminal or a reader's eye would follow in a text."""
    marks = {"\u202e", "\u2066"}
    return [c for c in text if (c < " " and c != "\n") or "\x7f" <= c <= "\x9f" or c in marks]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    path = tmp_path / "sft"
    run_stage(path, llama_lora())
    record = lineage(path)
    (stage,), (lamina,) = record.stages, record.laminae
    base = stage.base.model_copy(update={"name_or_path": f"base {HOSTILE}"})
    bad = record.model_copy(
        update={
            "stages": (stage.model_copy(update={"name": HOSTILE, "base": base}),),
            "laminae": (lamina.model_copy(update={"stage": HOSTILE}),),
        }
    )
    config = llama_lora()
    config.base_model_name_or_path = f"base {HOSTILE}"
    write_adapter(path, config, load_file(path / WEIGHTS), bad.to_metadata())
    return path


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_no_verb_passes_control_characters_on(
    hostile: Path, tmp_path: Path, verb: list[str], as_json: bool
) -> None:
    words = [str(tmp_path / "out") if word == "OUT" else word for word in verb[1:]]
    ended = CliRunner().invoke(
        app, [verb[0], str(hostile), *words, *(["--json"] if as_json else [])]
    )
    assert not isinstance(ended.exception, Exception) or isinstance(ended.exception, SystemExit)
    assert ended.stdout or ended.stderr
    assert obeyed(ended.stdout) == []
    assert obeyed(ended.stderr) == []
    if as_json and ended.stdout:
        # It is still JSON, and says what the file says.
        json.loads(ended.stdout)


def test_tables_and_facts_keep_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    out = console()
    out.print(table(["name", "rank"], [["a\nb", "4"], ["c", "8"]]))
    out.print(facts([("base", "x\ny"), ("dtype", "F32")]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert r"a\nb" in lines[1]
