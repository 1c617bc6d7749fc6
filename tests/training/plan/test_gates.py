"""Gates that can't be measured, or behind which a plan can't go on, are faults with lines."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.errors import PlanError
from lamina.training.plan.document import parse_document
from lamina.training.plan.reading import check_document

HEAD = """\
model_name_or_path: base
output_dir: runs
evals:
  texts: {datasets: a.txt}
  pairs: {datasets: p.jsonl, metric: accuracy}
"""
ROLLBACK = "gate: {may_lose: {texts: 0}, on_failure: rollback}"


def stage(name: str, method: str = "pt", **more: Any) -> str:
    said = "".join(f", {key}: {value}" for key, value in more.items() if key != "gate")
    gate = f", {more['gate']}" if "gate" in more else ""
    return f"  - {{name: {name}, method: {method}, datasets: d{said}{gate}}}\n"


def faults(*stages: str, defaults: str = "") -> list[str]:
    text = HEAD + (f"defaults: {{{defaults}}}\n" if defaults else "defaults:\n") + "stages:\n"
    try:
        check_document(parse_document(text + "".join(stages), "plan.yaml"))
    except PlanError as error:
        return list(error.faults)
    return []


FIRST = stage("a")


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([FIRST, stage("b", mode="stack", gate=ROLLBACK)], None),
        (
            [
                FIRST,
                stage("b", mode="stack", gate=ROLLBACK),
                stage("c", "dpo", mode="stack", reference="b"),
            ],
            "line 9: stages.b.gate.on_failure: 'b' is the reference of 'c', which would have none",
        ),
        (
            [stage("a", gate=ROLLBACK), stage("b", mode="continue")],
            "line 8: stages.a.gate.on_failure: 'b' would have nothing to continue",
        ),
        (
            [
                stage("a", gate=ROLLBACK),
                stage("b", mode="stack", gate=ROLLBACK),
                stage("c", mode="continue"),
            ],
            "line 9: stages.b.gate.on_failure: 'c' would have nothing to continue",
        ),
        ([FIRST, stage("b", mode="stack", gate=ROLLBACK), stage("c", mode="continue")], None),
        (
            [
                FIRST,
                stage(
                    "b",
                    "reward",
                    mode="stack",
                    gate="gate: {may_lose: {pairs: 0}, on_failure: rollback}",
                ),
                stage("c", "reward", mode="continue"),
            ],
            "line 9: stages.b.gate.on_failure: 'c' would continue a model without its head",
        ),
        (
            [FIRST, stage("b", "reward", mode="stack", gate="gate: {may_lose: {texts: 0}}")],
            "line 9: stages.b.gate.may_lose.texts: a reward model gives one number",
        ),
        ([FIRST, stage("b", "reward", mode="stack", gate="gate: {may_lose: {pairs: 0}}")], None),
        (
            [stage("a", gate="gate: {may_lose: {texts: 0}, max_retries: 3}")],
            "line 8: stages.a.gate.max_retries: means nothing to stop; it is for on_failure: retry",
        ),
        (
            [stage("a", gate="gate: {may_lose: {texts: 0}, max_retries: 3, on_failure: retry}")],
            None,
        ),
        (
            [stage("a", gate="gate: {may_lose: {text: 0}}")],
            "line 8: stages.a.gate.may_lose.text: there is no eval 'text'; did you mean 'texts'?",
        ),
    ],
)
def test_a_gate_that_cannot_do_what_it_says(stages: list[str], told: str | None) -> None:
    found = faults(*stages)
    assert len(found) == (told is not None), found
    assert all(each.startswith(str(told)) for each in found)


def test_a_gate_in_defaults_is_one_of_every_stage() -> None:
    found = faults(
        FIRST, stage("b", "reward", mode="stack"), defaults="gate: {may_lose: {texts: 0}}"
    )
    (fault,) = found
    assert fault == (
        "line 6: defaults.gate.may_lose.texts: a reward model gives one number, of which only "
        "accuracy can be measured: stage 'b' can't pass this"
    )
    own = stage("b", "reward", mode="stack", gate="gate: {may_lose: {pairs: 0}}")
    assert faults(FIRST, own, defaults="gate: {may_lose: {texts: 0}}") == []


@pytest.mark.parametrize(
    ("reference", "there"), [("a", False), ("b", True), ("parent", True), ("base", True)]
)
def test_merge_leaves_no_earlier_stage_as_a_reference(reference: str, there: bool) -> None:
    middle, last = stage("b", mode="stack"), stage("c", "dpo", mode="merge", reference=reference)
    found = faults(FIRST, middle, last)
    told = f"line 10: stages.c.reference: merge folds {reference!r} into the base together"
    assert len(found) == (not there)
    assert all(each.startswith(told) for each in found)
    shared = faults(
        FIRST, middle, stage("c", "dpo", mode="merge"), defaults=f"reference: {reference}"
    )
    assert len(shared) == (not there)
    assert all(each.startswith("line 6: defaults.reference: merge folds") for each in shared)
    assert not faults(FIRST, middle, last.replace("merge", "stack"))


def test_what_is_given_twice_is_not_overruled_in_silence() -> None:
    (fault,) = faults(stage("a", learning_rate=0.1, trainer_args="{learning_rate: 0.2}"))
    assert fault.startswith("line 8: stages.a.trainer_args.learning_rate: ")
    assert fault.endswith("learning_rate is given beside trainer_args too")


def test_of_two_that_exclude_each_other_the_command_line_has_the_last_word() -> None:
    text = HEAD + "stages:\n" + stage("a", num_train_epochs=3)
    document = parse_document(text, "plan.yaml")
    plan = check_document(document, ["stages.a.max_steps=2"]).plan
    assert (plan.stages[0].max_steps, plan.stages[0].num_train_epochs) == (2, None)
    both = ["stages.a.max_steps=2", "stages.a.num_train_epochs=1"]
    with pytest.raises(PlanError, match="one of them is enough"):
        check_document(parse_document(text, "plan.yaml"), both)


@pytest.mark.parametrize("begin", ["eva", "corda", "lora_ga", "loftq"])
def test_a_beginning_that_looks_at_data_is_none_of_a_plan(begin: str) -> None:
    (fault,) = faults(stage("a", init_lora_weights=begin))
    assert fault.startswith(f"line 8: stages.a.init_lora_weights: {begin!r} begins by what it sees")
    assert not faults(stage("a", init_lora_weights="pissa"))


def test_a_stage_of_one_step_has_no_warmup() -> None:
    for said, expected in (("", 0.03), (", max_steps: 1", 0.0), (", max_steps: 2", 0.03)):
        text = HEAD + "stages:\n" + FIRST.replace("}", said + "}")
        plan = check_document(parse_document(text, "plan.yaml")).plan
        assert plan.settings_of(plan.stages[0]).warmup_steps == expected
