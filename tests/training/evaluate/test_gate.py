"""What gates say of scores."""

from __future__ import annotations

import math

import pytest

from lamina.training.evaluate.gate import verdict
from lamina.training.evaluate.scores import Judged, Measured, Score
from lamina.training.plan.settings import Gate


def judged(value: float | None, *, higher: bool = False) -> Judged:
    score = None if value is None else Score("m", value, higher, 5)
    return Judged("w", {"own": Measured("h", score)})


def gate(share: float | str) -> Gate:
    return Gate.model_validate({"may_lose": {"own": share}})


@pytest.mark.parametrize(
    ("share", "before", "after", "higher", "passes"),
    [
        ("5%", 2.0, 2.1, False, True),
        ("5%", 2.0, 2.11, False, False),
        ("5%", 0.8, 0.76, True, True),
        ("5%", 0.8, 0.75, True, False),
        (0, 2.0, 2.0, False, True),
        (0, 2.0, 2.001, False, False),
        ("-10%", 2.0, 1.8, False, True),
        ("-10%", 2.0, 1.9, False, False),
        ("-10%", 0.5, 0.55, True, True),
        ("-10%", 0.5, 0.54, True, False),
        # A negative score, such as a mean reward: the share is of its size.
        ("5%", -2.0, -2.09, True, True),
        ("5%", -2.0, -2.2, True, False),
        # From nothing nothing can be lost, but everything gained.
        (0, 0.0, 0.0, True, True),
        (0, 0.0, 0.1, True, True),
        ("99%", 0.0, 0.1, False, False),
        ("99%", 1.0, math.nan, False, False),
        ("99%", 1.0, math.inf, False, False),
    ],
)
def test_the_share_that_may_be_lost(
    share: float | str, before: float, after: float, higher: bool, passes: bool
) -> None:
    found = verdict(gate(share), judged(before, higher=higher), judged(after, higher=higher))
    assert found.passed is passes
    assert len(found.told) == (1 if passes else 0)


def test_a_sentence_says_what_was_lost_and_what_might_have_been() -> None:
    found = verdict(gate("5%"), judged(2.0), judged(3.0))
    assert found.faults == ("own: m 2 -> 3, worse by 50.0%; it may lose 5.0%",)
    found = verdict(gate(0), judged(2.0), judged(2.0))
    assert found.told == ("own: m 2 -> 2, the same; it may not get worse",)
    found = verdict(gate("-5%"), judged(2.0), judged(1.0))
    assert found.told == ("own: m 2 -> 1, better by 50.0%; it has to get better by 5.0%",)


def test_what_was_not_measured_does_not_pass() -> None:
    for before, after, when in (
        (None, judged(1.0), "before"),
        (judged(None), judged(1.0), "before"),
        (judged(1.0), judged(None), "after"),
        (None, judged(None), "before and after"),
    ):
        found = verdict(gate("5%"), before, after)
        assert found.faults == (f"own: it can't be compared: it wasn't measured {when} the stage",)


def test_without_a_gate_everything_passes() -> None:
    assert verdict(None, None, judged(math.nan)).passed
