"""Gain, forgetting and backward transfer, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest

from lamina.training.evaluate.matrix import matrix_of
from lamina.training.evaluate.scores import Evaluation, Judged, Measured, Score

STAGES = ("domain", "chat", "polish")


def score(value: float, *, metric: str = "loss", higher: bool = False) -> Measured:
    return Measured("h", Score(metric, value, higher, 10))


def evaluation(learnt_in: dict[str, str] | None = None, **rows: list[float | None]) -> Evaluation:
    """Rows of values: the base's, then those of the stages; names that begin with `acc` rise."""

    def judged(place: int) -> Judged:
        found: dict[str, Measured] = {}
        for name, values in rows.items():
            value, rises = values[place], name.startswith("acc")
            found[name] = (
                Measured("h", None)
                if value is None
                else score(value, metric="accuracy" if rises else "loss", higher=rises)
            )
        return Judged("w", found)

    stages = {name: judged(place + 1) for place, name in enumerate(STAGES)}
    return Evaluation(judged(0), stages, tuple(rows), learnt_in or {})


def test_lower_is_better_of_losses() -> None:
    row = matrix_of(evaluation(text=[3.0, 2.0, 2.5, 2.25]), STAGES).rows[0]
    assert [cell.change for cell in row.cells] == [None, -1.0, 0.5, -0.25]
    assert [cell.gain for cell in row.cells] == [None, 1.0, -0.5, 0.25]
    assert [cell.from_base for cell in row.cells] == [None, 1.0, 0.5, 0.75]
    assert (row.gain, row.forgetting, row.transfer) == (0.75, 0.25, -0.25)
    assert (row.learnt_in, row.told) == ("domain", False)


def test_higher_is_better_of_shares() -> None:
    row = matrix_of(evaluation(acc=[0.5, 0.25, 0.5, 1.0]), STAGES).rows[0]
    assert [cell.gain for cell in row.cells] == [None, -0.25, 0.25, 0.5]
    assert (row.gain, row.forgetting, row.transfer) == (0.5, 0.0, None)
    assert row.learnt_in == "polish"


def test_the_plan_says_whose_task_an_eval_is() -> None:
    found = matrix_of(evaluation({"text": "chat"}, text=[3.0, 1.0, 2.0, 2.5]), STAGES)
    row = found.rows[0]
    assert (row.learnt_in, row.told, row.transfer) == ("chat", True, -0.5)
    # A stage that was rolled back is no part of the chain, and nothing was learnt in it.
    row = matrix_of(evaluation({"text": "chat"}, text=[3.0, 1.0, 2.0, 2.5]), STAGES[::2]).rows[0]
    assert (row.learnt_in, row.told) == ("domain", False)
    assert [cell.score and cell.score.value for cell in row.cells] == [3.0, 1.0, 2.5]


def test_backward_transfer_is_a_mean_over_the_evals_of_a_metric() -> None:
    found = matrix_of(
        evaluation(a=[3.0, 1.0, 1.5, 2.0], b=[3.0, 3.0, 1.0, 0.5], acc=[0.0, 0.5, 0.5, 0.25]),
        STAGES,
    )
    assert found.backward_transfer == {
        "loss": pytest.approx(((1.0 - 2.0) + (1.0 - 0.5)) / 2),
        "accuracy": -0.25,
    }


def test_what_never_got_better_was_learnt_nowhere() -> None:
    row = matrix_of(evaluation(text=[1.0, 1.0, 2.0, 3.0]), STAGES).rows[0]
    assert (row.learnt_in, row.transfer, row.gain, row.forgetting) == (None, None, -2.0, 2.0)


def test_holes_are_holes() -> None:
    found = matrix_of(
        evaluation(text=[3.0, None, 2.0, None], none=[None, None, None, None]), STAGES
    )
    assert [row.name for row in found.rows] == ["text"]
    row = found.rows[0]
    assert [cell.gain for cell in row.cells] == [None, None, None, None]
    assert [cell.from_base for cell in row.cells] == [None, None, 1.0, None]
    assert (row.gain, row.forgetting, row.transfer, row.learnt_in) == (None, None, None, None)


@pytest.mark.parametrize(
    ("values", "forgetting"),
    [
        ([3.0, 2.0, 2.5, math.nan], math.inf),
        ([math.nan, 2.0, 2.5, 2.25], 0.25),
        ([3.0, math.nan, 2.0, 2.25], 0.25),
        ([math.nan, math.nan, math.nan, 2.0], None),
        ([math.inf, math.inf, math.inf, math.inf], 0.0),
        ([3.0, 2.0, 2.5, math.inf], math.inf),
    ],
)
def test_what_is_no_number_forgets_everything_and_was_never_the_best(
    values: list[float | None], forgetting: float | None
) -> None:
    assert matrix_of(evaluation(text=values), STAGES).rows[0].forgetting == forgetting
