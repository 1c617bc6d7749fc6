"""The example with a support bot: its data, its plan, and what a short run of it comes to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lamina
from lamina.cli import app
from lamina.training.evaluate.scores import Evaluation
from lamina.training.plan import read_plan
from lamina.training.preflight import check_plan
from lamina.training.run import run_plan

EXAMPLE = Path(__file__).parents[2] / "examples" / "support-bot"
BASE = Path(lamina.__file__).parent / "demo" / "base"
SHORT = (
    "evals.manual.max_samples=24",
    "evals.talks.max_samples=24",
    "evals.answers.max_samples=8",
    "evals.answers.max_new_tokens=8",
    "evals.pairs.max_samples=12",
    "evals.general.max_samples=6",
    "stages.manual.max_steps=25",
    "stages.talks.max_steps=20",
    "stages.preferences.max_steps=4",
    "stages.preferences.learning_rate=2e-4",
    # What so few steps may cost is no measure.
    'stages.talks.gate={"may_lose": {"manual": 10, "general": 10}}',
    'stages.preferences.gate={"may_lose": {"manual": 10, "general": 10}}',
)


def made(folder: Path) -> Path:
    """A copy of the example with its data."""
    copy = folder / "support-bot"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("data"))
    # Sets in another order each time would show.
    environment = {key: each for key, each in os.environ.items() if key != "PYTHONHASHSEED"}
    subprocess.run([sys.executable, str(copy / "make_data.py")], check=True, env=environment)
    return copy


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("example"))


def rows(example: Path, name: str) -> list[Any]:
    return [json.loads(line) for line in (example / "data" / name).read_text().splitlines()]


def test_its_data_is_the_same_every_time(example: Path, tmp_path: Path) -> None:
    again = made(tmp_path)
    names = sorted(file.name for file in (example / "data").iterdir())
    assert "talks.jsonl" in names
    for name in names:
        assert (again / "data" / name).read_bytes() == (example / "data" / name).read_bytes(), name


def test_nothing_that_is_held_out_is_trained_on(example: Path) -> None:
    read, held_out = (
        set((example / "data" / name).read_text().strip().split("\n\n"))
        for name in ("manual.txt", "manual_held_out.txt")
    )
    assert held_out
    assert not read & held_out
    trained = {
        turn["content"]
        for name, key in (("talks", "messages"), ("rehearsal", "messages"), ("pairs", "prompt"))
        for row in rows(example, f"{name}.jsonl")
        for turn in row[key]
        if turn["role"] == "user"
    }
    asked = [row["messages"][0]["content"] for row in rows(example, "talks_held_out.jsonl")]
    asked += [row["prompt"][0]["content"] for row in rows(example, "pairs_held_out.jsonl")]
    assert len(asked) > 200
    assert not trained & set(asked)
    general = {row["text"] for row in rows(example, "general.jsonl")}
    assert not general & {row["text"] for row in rows(example, "general_held_out.jsonl")}


def test_held_out_answers_stand_in_the_manual(example: Path) -> None:
    manual = (example / "data" / "manual.txt").read_text()
    for row in rows(example, "talks_held_out.jsonl"):
        assert row["messages"][1]["content"] in manual


def test_its_plan_can_be_run(example: Path) -> None:
    plan = read_plan(EXAMPLE / "plan.yaml")
    assert (EXAMPLE / plan.model_name_or_path).resolve() == BASE.resolve()
    plan = plan.model_copy(update={"model_name_or_path": str(BASE)})
    report = check_plan(plan, root=example)
    report.check()
    # Minutes on two cores.
    assert sum(stage.steps or 0 for stage in report.stages) < 800


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_run_learns_what_each_stage_is_for(example: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    changes = [f"model_name_or_path={BASE}", f"output_dir={out}", *SHORT]
    result = run_plan(read_plan(example / "plan.yaml", changes), root=example)
    assert [each.status for each in result.stages] == ["trained"] * 3
    scores = Evaluation.read(out)
    base, manual, talks, preferences = (
        {name: each.score(name).value for name in scores.evals}
        for each in (scores.base, *(scores.stages[each.name] for each in result.stages))
    )
    assert manual["manual"] < 0.7 * base["manual"]
    assert talks["talks"] < 0.6 * manual["talks"]
    assert talks["general"] < 1.3 * base["general"]
    assert preferences["pairs"] >= talks["pairs"]
    record = lamina.lineage(result.path)
    assert [each.mode for each in record.stages] == ["fresh", "stack", "continue"]

    told = CliRunner().invoke(app, ["verify", result.path, "--base", str(BASE)])
    assert told.exit_code == 0, told.output
    tokens = torch.tensor([[9, 80, 700, 41, 5, 333, 2048, 77]])
    logits = []
    for load in (lamina.load, lambda path, model: peft.PeftModel.from_pretrained(model, path)):
        model = load(result.path, AutoModelForCausalLM.from_pretrained(BASE)).eval()
        with torch.no_grad():
            logits.append(model(input_ids=tokens).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)
