"""Gates of stages: stop, roll back, make again; judged by what was measured of what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import DivergedError, GateError
from lamina.training.evaluate.scores import Evaluation, Score
from lamina.training.run import Told
from lamina.training.run.state import RunState
from lamina.training.run.status import matrix_in, status_of
from tests.training.run import plans

EVALS = {"texts": {"datasets": "texts.jsonl"}}
FIRST = {"name": "a", "method": "pt"}
LAST = {"name": "c", "method": "sft", "mode": "stack"}


def spoiling(**gate: Any) -> dict[str, Any]:
    """A stage that forgets texts, at a learning rate far too high."""
    return {
        "name": "b",
        "method": "sft",
        "mode": "stack",
        "learning_rate": 0.5,
        "lora_target_modules": "all-linear",
        "gate": {"may_lose": {"texts": "0.1%"}, **gate},
    }


class Heard(Told):
    def __init__(self) -> None:
        self.events: list[tuple[str, ...]] = []

    def stage_begins(self, name: str, number: int, why: str) -> None:
        self.events.append(("begins", name))

    def measured(self, name: str, eval_name: str, score: Score | None) -> None:
        self.events.append(("measured", name))

    def retried(self, name: str, learning_rate: float) -> None:
        self.events.append(("retried", name, f"{learning_rate:g}"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    plans.write_base(folder)
    return folder


def write_plan(folder: Path, stages: list[dict[str, Any]], **given: Any) -> Path:
    folder.mkdir(exist_ok=True)
    plans.write_rows(folder / "texts.jsonl", plans.ROWS["pt"]())
    return plans.write_plan(folder, stages, **given)


def scores(folder: Path) -> dict[str, float]:
    found = Evaluation.read(folder / "out")
    return {name: each.score("texts").value for name, each in found.stages.items()}  # type: ignore[union-attr]


def test_a_stage_that_costs_too_much_ends_the_run(base: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path, [FIRST, spoiling(), LAST], base=base, evals=EVALS)
    with pytest.raises(GateError, match="Stage 'b' costs more than its gate allows") as caught:
        plans.run(path, report=True)
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    assert "texts: loss" in caught.value.faults[0]
    assert "it may lose 0.1%" in caught.value.faults[0]
    assert [each.status for each in status_of(tmp_path / "out").stages] == [
        "finished",
        "refused",
        "waiting",
    ]
    assert not (tmp_path / "out" / "c").exists()
    heard = Heard()
    with pytest.raises(GateError):
        plans.run(path, console=heard)
    # What is finished and measured is neither trained nor measured again.
    assert heard.events == []
    # A looser gate lets the same stage pass.
    result = plans.run(path, "stages.b.gate.may_lose.texts=1000000", console=heard)
    assert [each.status for each in result.stages] == ["kept", "kept", "trained"]


def test_a_stage_that_is_rolled_back_leaves_the_chain_as_it_was(base: Path, tmp_path: Path) -> None:
    stages = [FIRST, spoiling(on_failure="rollback"), LAST]
    path = write_plan(tmp_path / "with", stages, base=base, evals=EVALS)
    result = plans.run(path)
    assert [each.status for each in result.stages] == ["trained", "rolled back", "trained"]
    assert "texts: loss" in result.stages[1].why
    without = write_plan(tmp_path / "without", [FIRST, LAST], base=base, evals=EVALS)
    other = plans.run(without)
    mine, theirs = plans.tensors(result.path), plans.tensors(other.path)
    assert mine.keys() == theirs.keys()
    assert all((mine[key] == theirs[key]).all() for key in mine)
    assert [each.name for each in lamina.lineage(result.path).stages] == ["a", "c"]
    assert matrix_in(tmp_path / "with" / "out").columns == ("base", "a", "c")
    state = RunState.read(tmp_path / "with" / "out")
    assert state.stages["c"].built_on == "a"
    assert state.stages["b"].standing == "rolled back"
    again = plans.run(path)
    assert [each.status for each in again.stages] == ["kept", "rolled back", "kept"]


def test_without_its_first_stage_a_chain_begins_with_the_second(base: Path, tmp_path: Path) -> None:
    impossible = {"may_lose": {"texts": "-50%"}, "on_failure": "rollback"}
    first = {**FIRST, "gate": impossible}
    path = write_plan(tmp_path, [first, LAST], base=base, evals=EVALS)
    result = plans.run(path)
    assert [each.status for each in result.stages] == ["rolled back", "trained"]
    assert [each.name for each in lamina.lineage(result.path).stages] == ["c"]


def test_a_run_may_come_to_nothing(base: Path, tmp_path: Path) -> None:
    impossible = {"may_lose": {"texts": "-50%"}, "on_failure": "rollback"}
    first = {**FIRST, "gate": impossible}
    path = write_plan(tmp_path, [first], base=base, evals=EVALS)
    result = plans.run(path)
    assert (result.path, result.interrupted) == ("", False)


def test_a_stage_is_made_again_at_a_lower_rate_until_it_passes(base: Path, tmp_path: Path) -> None:
    gate = {"on_failure": "retry", "retry_factor": 0.01, "max_retries": 3}
    path = write_plan(tmp_path, [FIRST, spoiling(**gate), LAST], base=base, evals=EVALS)
    heard = Heard()
    result = plans.run(path, console=heard)
    assert result.stages[1].status == "trained"
    tries = [event for event in heard.events if event[0] == "retried"]
    assert tries
    assert tries[0] == ("retried", "b", "0.005")
    state = RunState.read(tmp_path / "out").stages["b"]
    assert [each.learning_rate for each in state.retries] == [0.5, 0.005][: len(tries)]
    assert state.gate is not None
    assert state.gate.passed
    assert state.inputs["learning_rate"] == pytest.approx(0.5 * 0.01 ** len(tries))
    found = scores(tmp_path)
    assert found["b"] <= found["a"] * 1.001
    # The try that passed is what a later run keeps.
    again = plans.run(path, console=heard)
    assert [each.status for each in again.stages] == ["kept", "kept", "kept"]
    assert [event for event in heard.events if event[0] == "retried"] == tries


def test_retries_end(base: Path, tmp_path: Path) -> None:
    gate = {"on_failure": "retry", "retry_factor": 0.9, "max_retries": 2}
    path = write_plan(tmp_path, [FIRST, spoiling(**gate)], base=base, evals=EVALS)
    with pytest.raises(GateError, match="after 2 retries"):
        plans.run(path)
    assert len(RunState.read(tmp_path / "out").stages["b"].retries) == 2
    # One more is allowed: the run goes on from the tries that it knows.
    heard = Heard()
    with pytest.raises(GateError, match="after 3 retries"):
        plans.run(path, "stages.b.gate.max_retries=3", console=heard)
    assert [each for each in heard.events if each[0] == "begins"] == [("begins", "b")]
    # Another setting is another stage, with tries of its own.
    result = plans.run(path, "stages.b.learning_rate=0.001")
    assert result.stages[1].status == "trained"
    assert RunState.read(tmp_path / "out").stages["b"].retries == ()


def test_what_was_measured_is_kept_until_it_depends_on_something_else(
    base: Path, tmp_path: Path
) -> None:
    path = write_plan(tmp_path, [FIRST], base=base, evals=EVALS)
    heard = Heard()
    plans.run(path, console=heard)
    assert heard.events == [("measured", "base"), ("begins", "a"), ("measured", "a")]
    heard.events.clear()
    plans.run(path, "evals.texts.max_samples=3", console=heard)
    assert heard.events == [("measured", "base"), ("measured", "a")]
    heard.events.clear()
    plans.run(path, "evals.texts.max_samples=3", "defaults.learning_rate=0.01", console=heard)
    assert heard.events == [("begins", "a"), ("measured", "a")]
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["stages"]["a"]["scores"]["texts"]["score"]["examples"] == 3
    assert told["stages"]["a"]["drift"]


def test_a_run_from_the_beginning_measures_anew(base: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path, [FIRST], base=base, evals=EVALS)
    plans.run(path)
    file = tmp_path / "out" / "evaluation.json"
    before = scores(tmp_path)
    told = json.loads(file.read_text())
    told["stages"]["a"]["scores"]["texts"]["score"]["value"] = 0.5
    file.write_text(json.dumps(told))
    heard = Heard()
    plans.run(path, console=heard, resume=False)
    assert heard.events == [("measured", "base"), ("begins", "a"), ("measured", "a")]
    assert scores(tmp_path) == before


def test_prompts_are_answered_by_base_and_stages(base: Path, tmp_path: Path) -> None:
    prompts = ["Once", {"text": "Then", "max_new_tokens": 3}]
    path = write_plan(tmp_path, [FIRST], base=base, prompts=prompts)
    plans.run(path)
    found = Evaluation.read(tmp_path / "out")
    for judged in (found.base, found.stages["a"]):
        assert [each.prompt for each in judged.answers] == ["Once", "Then"]
        assert judged.answers[1].tokens <= 3


def test_a_broken_bound_is_told_with_all_others(base: Path, tmp_path: Path) -> None:
    evals = {**EVALS, "talks": {"datasets": "sft.jsonl"}}
    gate = {"may_lose": {"texts": 0, "talks": "-99%"}}
    path = write_plan(
        tmp_path,
        [FIRST, {**LAST, "gate": gate, "learning_rate": 0.5, "lora_target_modules": "all-linear"}],
        base=base,
        evals=evals,
    )
    with pytest.raises(GateError) as caught:
        plans.run(path)
    assert [each.partition(":")[0] for each in caught.value.faults] == ["texts", "talks"]
    assert "it has to get better by 99.0%" in caught.value.faults[1]


def test_a_stage_without_retries_has_the_rate_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    gate = {"on_failure": "retry", "retry_factor": 0.01, "max_retries": 3}
    path = write_plan(tmp_path, [FIRST, spoiling(**gate)], base=base, evals=EVALS)
    plans.run(path)
    tried = RunState.read(tmp_path / "out").stages["b"]
    assert tried.retries
    assert tried.inputs["learning_rate"] < 0.5
    # Another factor leads to other tries after the first.
    plans.run(path, "stages.b.gate.retry_factor=0.02")
    again = RunState.read(tmp_path / "out").stages["b"]
    assert again.inputs["learning_rate"] == pytest.approx(0.5 * 0.02 ** len(again.retries))
    assert again.retries[0] == tried.retries[0]
    # A gate that only stops, and none at all, have no tries but the first.
    write_plan(tmp_path, [FIRST, spoiling(may_lose={"texts": 1e6})], base=base, evals=EVALS)
    plans.run(path)
    first = RunState.read(tmp_path / "out").stages["b"]
    assert first.inputs["learning_rate"] == 0.5
    assert first.retries == ()


DIVERGING = {**LAST, "name": "b", "learning_rate": 1e30, "max_grad_norm": 0}


def test_a_stage_that_diverges_is_made_again(base: Path, tmp_path: Path) -> None:
    gate = {"may_lose": {"texts": "90%"}, "on_failure": "retry", "retry_factor": 1e-32}
    path = write_plan(tmp_path, [FIRST, {**DIVERGING, "gate": gate}], base=base, evals=EVALS)
    result = plans.run(path, report=True)
    assert [each.status for each in result.stages] == ["trained", "trained"]
    state = RunState.read(tmp_path / "out").stages["b"]
    assert "diverged: " in state.retries[0].faults[0]
    assert [each.status for each in plans.run(path).stages] == ["kept", "kept"]


def test_a_stage_that_diverges_is_rolled_back_once(base: Path, tmp_path: Path) -> None:
    gate = {"may_lose": {"texts": "90%"}, "on_failure": "rollback"}
    stages = [FIRST, {**DIVERGING, "gate": gate}, LAST]
    path = write_plan(tmp_path, stages, base=base, evals=EVALS)
    result = plans.run(path, report=True)
    assert [each.status for each in result.stages] == ["trained", "rolled back", "trained"]
    assert [each.status for each in status_of(tmp_path / "out").stages] == [
        "finished",
        "rolled back",
        "finished",
    ]
    heard = Heard()
    again = plans.run(path, console=heard)
    assert [each.status for each in again.stages] == ["kept", "rolled back", "kept"]
    assert heard.events == []


@pytest.mark.parametrize("gate", [None, {"may_lose": {"texts": "90%"}}])
def test_a_stage_that_diverges_ends_the_run(
    gate: dict[str, Any] | None, base: Path, tmp_path: Path
) -> None:
    path = write_plan(tmp_path, [FIRST, {**DIVERGING, "gate": gate}], base=base, evals=EVALS)
    with pytest.raises(DivergedError, match=r"stage 'b' diverged: \d+ of the 8 tensors"):
        plans.run(path)
    assert [each.status for each in status_of(tmp_path / "out").stages] == ["finished", "failed"]
    # A rate that it can learn at begins anew.
    result = plans.run(path, "stages.b.learning_rate=0.01", "stages.b.gate=null")
    assert result.stages[1].status == "trained"
