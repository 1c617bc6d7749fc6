"""`lamina import`: a plan of another tool's file."""

from __future__ import annotations

import json
from pathlib import Path

from lamina.training.plan import read_plan
from tests.cli.made import lamina

TEXT = """\
base_model: models/small
datasets: [{path: talks.jsonl, type: alpaca}]
output_dir: out/chat
adapter: lora
lora_r: 4
lora_target_linear: true
learning_rate: 0.0002
strict: true
"""


def test_writes_a_plan_and_lists_what_is_not_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(TEXT)
    plan = tmp_path / "plan.yaml"
    done = lamina("import", tmp_path / "a.yml", "-o", plan)
    assert done.exit_code == 0, done.stderr
    assert "strict: a run does without it" in done.stderr
    assert read_plan(plan).stages[0].name == "chat"
    printed = lamina("import", tmp_path / "a.yml")
    assert printed.stdout == plan.read_text()
    told = json.loads(lamina("import", tmp_path / "a.yml", "--json").stdout)
    assert (told["tools"], told["missing"]) == (["Axolotl"], [])
    assert told["notes"][0]["key"] == "strict"


def test_ends_with_one_where_values_are_missing(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(TEXT.replace("output_dir: out/chat\n", ""))
    done = lamina("import", tmp_path / "a.yml")
    assert done.exit_code == 1
    assert "output_dir: is missing" in done.stderr
