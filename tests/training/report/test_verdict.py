from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from lamina.training.evaluate.matrix import matrix_of
from lamina.training.evaluate.scores import Evaluation, Judged, Measured, Score
from lamina.training.report.facts import facts_of
from lamina.training.report.verdict import sentence_of
from tests.training.report import made


def verdict(folder: Path, scores: tuple[Mapping[str, float], ...], **changes: float) -> str:
    """Of a chain of stages with these scores, the first being the base's."""
    stages = [replace(each, scores=None, gate=None) for each in made.CHAIN[: len(scores) - 1]]
    run = made.write_run(folder / "run", stages, adapters=False, base_scores=None)
    evaluation = Evaluation(evals=tuple(scores[0]))
    for name, given in zip((None, *(each.name for each in stages)), scores, strict=True):
        measured = {
            key: Measured("", Score(key, value, key != "loss", 100, **changes))
            for key, value in given.items()
        }
        evaluation = evaluation.having(name, Judged("", measured))
    evaluation.write(run)
    facts = facts_of(run)
    return sentence_of(facts, matrix_of(facts.evaluation, facts.chain)).replace(
        "\N{NO-BREAK SPACE}", " "
    )


def test_gains_alone(tmp_path: Path) -> None:
    found = verdict(tmp_path, ({"loss": 4.0}, {"loss": 3.0}))
    assert found == (
        "domain is better than the base on loss (loss 4.000 → 3.000); "
        "nothing that was measured got worse."
    )


def test_what_was_lost_is_said(tmp_path: Path) -> None:
    found = verdict(tmp_path, ({"loss": 4.0, "accuracy": 0.8}, {"loss": 3.0, "accuracy": 0.6}))
    assert found == (
        "domain is better than the base on 1 of 2 evals: loss (loss 4.000 → 3.000), "
        "and worse on accuracy (accuracy 0.800 → 0.600)."
    )


def test_what_was_learnt_and_forgotten_is_said(tmp_path: Path) -> None:
    found = verdict(tmp_path, ({"loss": 4.0}, {"loss": 2.0}, {"loss": 3.0}))
    assert "better than the base on loss" in found
    assert "gave back some of what was learnt: loss (loss 2.000 → 3.000)" in found


def test_half_a_per_cent_is_neither(tmp_path: Path) -> None:
    found = verdict(tmp_path, ({"loss": 4.0}, {"loss": 3.99}))
    assert found == "domain is no better than the base on loss, and no worse."


def test_no_number_is_worse(tmp_path: Path) -> None:
    found = verdict(tmp_path, ({"loss": 4.0}, {"loss": math.nan}))
    assert found == (
        "domain is no better than the base on loss, and worse on loss (loss 4.000 → NaN)."
    )


def test_what_may_be_chance_is_marked(tmp_path: Path) -> None:
    found = verdict(tmp_path, ({"accuracy": 0.5}, {"accuracy": 0.52}), error=0.05)
    assert "accuracy (accuracy 0.500 → 0.520, within the error)" in found


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (made.CHAIN, "3 stages are finished; what was gained and what it cost isn't known"),
        (made.CHAIN[:1], "1 stage is finished; what was gained"),
        (
            (made.CHAIN[0], made.Made("chat", status="failed")),
            "the run isn't finished: chat is missing",
        ),
        ((made.Made("chat", status="failed"),), "No stage is finished yet: chat failed."),
        ((made.Made("chat", status="waiting"),), "No stage is finished yet."),
        ((made.REFUSED,), "No stage is left: slang cost more than allowed and was rolled back."),
        (
            (made.REFUSED, made.Made("chat", status="waiting")),
            "No stage is finished yet: slang cost more than allowed and was rolled back.",
        ),
        ((made.CHAIN[0], made.REFUSED), "slang cost more than allowed and was rolled back."),
    ],
)
def test_without_evals_it_says_so(tmp_path: Path, stages: tuple[made.Made, ...], told: str) -> None:
    run = made.write_run(tmp_path / "run", stages, adapters=False, base_scores=None)
    facts = facts_of(run)
    assert told in sentence_of(facts, matrix_of(facts.evaluation, facts.chain))
