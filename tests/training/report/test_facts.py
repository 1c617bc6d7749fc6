from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lamina.errors import RunError
from lamina.training.report.facts import facts_of
from lamina.training.run.state import Judgement, RunState
from tests.training.report import made


def test_the_chain_leaves_out_what_was_rolled_back(finished: Path) -> None:
    facts = facts_of(finished)
    assert facts.chain == ("domain", "chat", "prefer")
    assert [each.built_on for each in facts.stages] == [None, "domain", "chat", "chat"]
    assert [each.is_dead_end for each in facts.stages] == [False, False, True, False]
    assert facts.end is not None
    assert facts.end.name == "prefer"
    assert (facts.base_name, facts.base.model_class) == (made.BASE, "LlamaForCausalLM")


def test_modes_and_data_are_those_of_the_records(finished: Path) -> None:
    facts = facts_of(finished)
    assert [each.mode for each in facts.stages] == ["fresh", "stack", "stack", "continue"]
    assert [each.method for each in facts.stages] == ["pt", "sft", "sft", "dpo"]
    assert facts.stage("chat").data["sources"][0]["path"] == "data/chat.jsonl"


def test_what_is_killed_is_cut_off_and_the_rest_waits(tmp_path: Path) -> None:
    stages = (
        made.CHAIN[0],
        made.Made("chat", status="running", lines=3),
        made.Made("last", status="waiting"),
    )
    facts = facts_of(made.write_run(tmp_path / "run", stages))
    assert [each.standing for each in facts.stages] == ["finished", "cut off", "waiting"]
    assert facts.chain == ("domain",)
    assert [each.built_on for each in facts.stages] == [None, "domain", "chat"]


def test_without_adapters_the_notes_say_what_is_built_on_what(tmp_path: Path) -> None:
    stages = (*made.CHAIN[:2], made.REFUSED, made.CHAIN[2])
    facts = facts_of(made.write_run(tmp_path / "run", stages, adapters=False))
    assert facts.chain == ("domain", "chat", "prefer")
    assert facts.stage("prefer").mode == "continue"
    assert facts.stage("prefer").adapter is None


def test_a_directory_that_is_broken_is_a_fault_of_the_stage(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "chat" / "adapter_model.safetensors").write_bytes(b"\0" * 9)
    stage = facts_of(copy).stage("chat")
    assert stage.adapter is None
    assert "is not a safetensors file" in stage.fault


def test_no_run_is_an_error_that_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run(.|\n)*lamina run plan.yaml"):
        facts_of(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [(("stages", "chat", "seconds"), "long"), (("stages", "chat", "inputs"), 3), (("order",), [1])],
)
def test_notes_of_wrong_types_are_refused(
    finished: Path, tmp_path: Path, place: tuple[str, ...], value: object
) -> None:
    told = json.loads((finished / "run.json").read_text())
    inner = told
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "run.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"makes no sense|can't be read"):
        facts_of(tmp_path)


def test_scores_of_wrong_types_are_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "run.json", tmp_path)
    told = json.loads((finished / "evaluation.json").read_text())
    told["base"]["scores"]["docs"]["score"]["value"] = "<b>low</b>"
    (tmp_path / "evaluation.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"evaluation\.json makes no sense"):
        facts_of(tmp_path)


def test_a_name_that_leads_elsewhere_is_no_directory(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "inner"
    run.mkdir()
    shutil.copytree(finished / "domain", tmp_path / "domain")
    state = RunState.read(finished)
    state = replace(state, order=("../domain",), stages={"../domain": state.stages["domain"]})
    state.write(run)
    stage = facts_of(run).stages[0]
    assert stage.adapter is None
    assert stage.directory == run


def test_a_stage_below_itself_is_on_nothing(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run", made.CHAIN[:2], adapters=False)
    state = RunState.read(run)
    first = replace(state.stages["domain"], built_on="chat")
    state.having("domain", first).write(run)
    facts = facts_of(run)
    assert facts.chain == ()
    assert [each.standing for each in facts.stages] == ["outdated", "outdated"]


def test_a_stage_that_stopped_the_run_is_a_dead_end(tmp_path: Path) -> None:
    refused = replace(made.CHAIN[1], gate=Judgement(False, "stop", ("docs: worse",)))
    stages = (made.CHAIN[0], refused, replace(made.CHAIN[2], status="waiting"))
    facts = facts_of(made.write_run(tmp_path / "run", stages, adapters=False))
    assert facts.chain == ("domain",)
    assert facts.stage("chat").standing == "refused"
    assert facts.stage("prefer").built_on == "domain"
