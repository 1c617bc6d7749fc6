"""`lamina compare`: side by side, stacked, in a pipe, and what a run recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from lamina.cli.compare import _print
from lamina.training.conversing.compared import Compared, PromptAnswers, StageAnswer
from lamina.training.conversing.comparing import compare
from lamina.training.plan.schema import Prompt
from tests.cli.made import lamina
from tests.cli.test_hostile_names import HOSTILE, obeyed
from tests.training.conversing.talking import make_run, write_answers, write_state


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


FOUND = Compared(
    path="runs/out",
    base="models/small",
    asked=("base", "domain", "chat"),
    prompts=(
        PromptAnswers(
            "What is a stage?",
            (
                StageAnswer("base", "a word " * 12, 24, False),
                StageAnswer("domain", "One\n  two", 3, True, 0.5, 0.125),
                StageAnswer("chat", "", 0, True, 1.0, 0.0),
            ),
        ),
    ),
    notes=("dpo is no language model: it wasn't asked",),
)


def shown(width: int, *, terminal: bool = True, found: Compared = FOUND) -> list[str]:
    out = Console(width=width, force_terminal=terminal, color_system=None, highlight=False)
    with out.capture() as captured:
        _print(out, found)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_wide_terminal_has_a_column_for_each() -> None:
    lines = shown(120)
    (heading,) = (line for line in lines if line.split() == ["base", "domain", "chat"])
    first = lines[lines.index(heading) + 1]
    assert first.index("One") == heading.index("domain")
    assert first.index("(nothing)") == heading.index("chat")
    assert first.startswith("a word a word")
    assert lines[lines.index(heading) + 2].index("  two") == heading.index("domain")
    figures = " ".join(lines[-2:])
    assert "24 tokens, cut off" in figures
    assert "top-1 50%" in figures
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize(("width", "terminal"), [(80, True), (200, False)])
def test_elsewhere_answers_are_below_each_other(width: int, terminal: bool) -> None:
    lines = shown(width, terminal=terminal)
    assert lines[0] == "base → domain → chat  on models/small"
    assert lines[1] == FOUND.notes[0]
    assert "1. What is a stage?" in lines
    where = lines.index("domain  3 tokens, top-1 50%, KL 0.12")
    assert lines[where + 1 : where + 3] == ["    One", "      two"]
    assert lines[where + 3] == "chat  0 tokens, top-1 100%, KL 0"
    assert lines[where + 4] == "    (nothing)"


def test_it_prints_what_the_library_finds(out: Path) -> None:
    done = lamina("compare", out / "dpo", "w5 w6", "--max-new-tokens", 4, columns=80)
    assert done.exit_code == 0, done.output
    found = compare(out / "dpo", [Prompt(text="w5 w6", max_new_tokens=4)])
    lines = [line.strip() for line in done.stdout.splitlines()]
    for each in found.prompts[0].answers:
        assert each.text in lines
    as_json = lamina("compare", out / "dpo", "w5 w6", "--max-new-tokens", 4, "--json")
    assert json.loads(as_json.stdout) == json.loads(json.dumps(found.to_dict()))


def test_prompts_of_a_file_and_some_stages_only(out: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "w7", "max_new_tokens": 3}\n{"text": "w8", "chat": true}\n')
    arguments = ("--prompts", file, "--stages", "base,chat", "--plain", "--json")
    done = lamina("compare", out / "dpo", "w5", *arguments, "--max-new-tokens", 2)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["asked"] == ["base", "chat"]
    assert [each["prompt"] for each in found["prompts"]] == ["w5", "w7", "w8"]
    wanted = [
        Prompt(text="w5", max_new_tokens=2, chat=False),
        Prompt(text="w7", max_new_tokens=3, chat=False),
        Prompt(text="w8", max_new_tokens=2, chat=True),
    ]
    told = compare(out / "dpo", wanted, stages=["base", "chat"])
    assert found == json.loads(json.dumps(told.to_dict()))


def test_without_prompts_it_tells_what_the_run_recorded(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_state(folder)
    texts = {name: [f"{name} {HOSTILE}"] for name in ("base", "domain", "chat", "dpo")}
    write_answers(folder, texts, ["Who are you?"])
    done = lamina("compare", folder)
    assert done.exit_code == 0, done.output
    assert "base → domain → chat → dpo  recorded by the run" in done.stdout
    assert "Who are you?" in done.stdout
    assert done.stdout.count("evil") == 4
    assert obeyed(done.stdout) == []
    done = lamina("compare", folder, "--json", "--stages", "dpo")
    assert obeyed(done.stdout) == []
    assert json.loads(done.stdout)["asked"] == ["dpo"]
    done = lamina("compare", folder, "--base", "other", "--no-verify")
    assert done.exit_code == 2
    assert "--base" in done.stderr
    assert "--no-verify" in done.stderr
    done = lamina("compare", out / "dpo")
    assert done.exit_code == 2
    assert "has no answers on record" in done.stderr
    assert "--prompts FILE" in done.stderr


def test_what_is_wrong_is_told_at_once(out: Path) -> None:
    done = lamina("compare", out / "dpo", "w5", "--stages", "chta")
    assert done.exit_code == 2
    assert "choose 'chat'" in done.stderr
    done = lamina("compare", out / "dpo", "--prompts", out / "nowhere")
    assert done.exit_code == 2
    assert "can't be read" in done.stderr
