"""What a run says of itself when its plan was changed after stages were finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lamina.errors import GateError
from lamina.training.report import write_report
from lamina.training.run.state import RunState
from lamina.training.run.status import matrix_in, status_of
from tests.training.run import plans

EVALS = {"texts": {"datasets": "texts.jsonl"}}
FIRST = {"name": "a", "method": "pt"}
SECOND = {"name": "b", "method": "sft", "mode": "stack"}
THIRD = {"name": "c", "method": "sft", "mode": "stack"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    plans.write_base(folder)
    return folder


def write_plan(folder: Path, stages: list[dict[str, Any]], base: Path) -> Path:
    folder.mkdir(exist_ok=True)
    plans.write_rows(folder / "texts.jsonl", plans.ROWS["pt"]())
    return plans.write_plan(folder, stages, base=base, evals=EVALS)


def edit_stages(path: Path, stages: list[dict[str, Any]]) -> None:
    plan = yaml.safe_load(path.read_text())
    data = {each["name"]: each["datasets"] for each in plan["stages"]}
    plan["stages"] = [{"datasets": data.get(each["name"], "sft.jsonl"), **each} for each in stages]
    path.write_text(yaml.safe_dump(plan, sort_keys=False))


def standings(out: Path) -> list[str]:
    return [each.status for each in status_of(out).stages]


def test_a_stage_that_was_taken_out_of_the_plan_is_no_part_of_the_run(
    base: Path, tmp_path: Path
) -> None:
    path, out = write_plan(tmp_path, [FIRST, SECOND, THIRD], base), tmp_path / "out"
    plans.run(path)
    assert RunState.read(out).chain == ("a", "b", "c")
    edit_stages(path, [FIRST, SECOND])
    result = plans.run(path)
    assert [each.status for each in result.stages] == ["kept", "kept"]
    assert RunState.read(out).chain == ("a", "b")
    assert matrix_in(out).columns == ("base", "a", "b")
    assert "c is" not in write_report(out).verdict
    # It lies there as it was: put back, it is kept.
    edit_stages(path, [FIRST, SECOND, THIRD])
    assert [each.status for each in plans.run(path).stages] == ["kept"] * 3
    assert RunState.read(out).chain == ("a", "b", "c")
    # Nor is a stage that was built on what was taken out.
    state = RunState.read(out)
    without = RunState(state.stages, ("a", "c"), state.base)
    assert (without.chain, without.outdated) == (("a",), {"c"})
    assert RunState(state.stages, ("b", "c"), state.base).chain == ()


def test_what_was_built_on_a_stage_that_is_refused_now_is_outdated(
    base: Path, tmp_path: Path
) -> None:
    path, out = write_plan(tmp_path, [FIRST, SECOND, THIRD], base), tmp_path / "out"
    plans.run(path)
    impossible = {"may_lose": {"texts": "-50%"}}
    edit_stages(path, [FIRST, {**SECOND, "learning_rate": 0.01, "gate": impossible}, THIRD])
    with pytest.raises(GateError):
        plans.run(path, report=True)
    assert standings(out) == ["finished", "refused", "outdated"]
    assert RunState.read(out).chain == ("a",)
    assert matrix_in(out).columns == ("base", "a")
    card = (out / "report" / "README.md").read_text()
    assert "c is better than the base" not in card
    assert not (out / "c" / "README.md").exists()
    # Without the gate the stage counts, and the next is made anew on it.
    edit_stages(path, [FIRST, {**SECOND, "learning_rate": 0.01}, THIRD])
    assert [each.status for each in plans.run(path).stages] == ["kept", "kept", "trained"]
    assert RunState.read(out).chain == ("a", "b", "c")
    assert standings(out) == ["finished"] * 3


def test_what_was_built_on_a_stage_that_was_made_again_is_outdated(
    base: Path, tmp_path: Path
) -> None:
    path, out = write_plan(tmp_path, [FIRST, SECOND], base), tmp_path / "out"
    plans.run(path)
    edit_stages(path, [{**FIRST, "learning_rate": 0.01}])
    plans.run(path)
    state = RunState.read(out)
    both = RunState(state.stages, ("a", "b"), state.base)
    assert (both.chain, both.outdated) == (("a",), {"b"})
