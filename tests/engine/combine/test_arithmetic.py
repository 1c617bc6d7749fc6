from __future__ import annotations

import pytest
import torch

from lamina.engine.combine.arithmetic import agreed_sum, keep_largest, keep_random, weighted_sum
from tests import models

# Columns of three tensors: agree, draw, minority, zero beside a negative.
FIRST = torch.tensor([1.0, 2.0, -3.0, 0.0])
SECOND = torch.tensor([3.0, -2.0, 1.0, -4.0])
THIRD = torch.tensor([2.0, 0.0, 1.0, 0.0])
ALL = [FIRST, SECOND, THIRD]


def test_the_largest_entries_are_kept() -> None:
    kept = keep_largest(torch.tensor([[3.0, -1.0], [-4.0, 2.0]]), 0.5)
    assert kept.tolist() == [[3.0, 0.0], [-4.0, 0.0]]
    # 0.7 of four is two: what is kept is rounded down.
    assert int((keep_largest(torch.arange(1.0, 5), 0.7) != 0).sum()) == 2
    assert keep_largest(FIRST, 1.0) is FIRST


def test_random_entries_are_kept_and_scaled_up() -> None:
    with models.seeded(0):
        kept = keep_random(torch.ones(10_000), 0.25)
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)


def test_a_weighted_sum() -> None:
    assert weighted_sum(ALL, [1.0, -2.0, 0.5]).tolist() == [-4.0, 6.0, -4.5, 8.0]


@pytest.mark.parametrize(
    ("majority", "third"),
    # By their sum the -3 wins, by their number the two ones.
    [("total", -3.0), ("frequency", (1.0 + 2.0) / 2)],
)
def test_only_entries_of_the_elected_sign_are_averaged(majority: str, third: float) -> None:
    merged = agreed_sum(ALL, [1.0, 1.0, 2.0], majority)
    assert merged.tolist() == pytest.approx([(1 + 3 + 4) / 3, 2.0, third, -4.0])


def test_an_entry_that_nobody_has_stays_zero() -> None:
    assert agreed_sum([torch.zeros(1), torch.zeros(1)], [1.0, 1.0], "total").tolist() == [0.0]
