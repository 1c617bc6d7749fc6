"""A plan to begin with: it can be read, and all that it shows can be uncommented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lamina.errors import PlanError
from lamina.training.plan import read_plan
from lamina.training.plan.schema import BUILT_IN, Plan
from lamina.training.plan.settings import Settings
from lamina.training.plan.writing import new_stages, plan_text, write_plan

METHODS = ["pt", "sft", "dpo", "kto", "orpo", "grpo", "reward"]


def test_what_is_written_is_a_plan_of_what_was_asked_for(tmp_path: Path) -> None:
    stages = new_stages(METHODS, [f"{each}.jsonl" for each in METHODS], "continue")
    text = plan_text("a/b: c", stages, output_dir="runs/x")
    plan = read_plan(write_plan(tmp_path / "sub" / "plan.yaml", text))
    assert (plan.model_name_or_path, plan.output_dir) == ("a/b: c", "runs/x")
    assert [stage.method for stage in plan.stages] == METHODS
    assert [stage.mode for stage in plan.stages] == [None, *["continue"] * 6]
    assert [stage.datasets[0].path for stage in plan.stages if stage.datasets] == [
        f"{each}.jsonl" for each in METHODS
    ]
    names = [stage.name for stage in plan.stages]
    assert names == ["domain", "chat", "preference", "preference2", "aligned", "grpo", "reward"]


def test_every_setting_is_there_with_its_default_and_can_be_uncommented() -> None:
    text = plan_text("base", new_stages(METHODS, []))
    bare = re.sub(r"^( *)# (?=[a-z0-9_]+:)", r"\1", text, flags=re.M)
    shown = yaml.safe_load(bare.partition("# Held-out sets")[0])
    defaults = shown.pop("defaults")
    assert {**shown, "defaults": 0, "evals": 0, "stages": 0}.keys() == Plan.model_fields.keys()
    assert {k: v for k, v in defaults.items() if v is not None} == {**BUILT_IN, "lora_alpha": 32}
    for name in Settings.model_fields:
        assert re.search(rf"\b{name}:", text), name
    Settings.model_validate(defaults)
    assert max(map(len, text.splitlines())) <= 100


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    file = write_plan(tmp_path / "plan.yaml", "one")
    with pytest.raises(PlanError, match="is there already"):
        write_plan(file, "two")
    assert file.read_text() == "one"
    assert write_plan(file, "two", overwrite=True).read_text() == "two"
    assert [each.name for each in tmp_path.iterdir()] == ["plan.yaml"]


def test_all_that_is_wrong_with_what_was_asked_for() -> None:
    with pytest.raises(PlanError) as caught:
        new_stages(["pt", "stf"], ["a"], "stak")
    assert caught.value.faults == (
        "'stf' is none of pt, sft, dpo, kto, orpo, reward, grpo; did you mean 'sft'?",
        "'stak' is none of continue, stack, merge; did you mean 'stack'?",
        "1 data for 2 stages: give one for each",
    )
