"""The best update of fewer ranks, and what it leaves out, against a dense decomposition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.engine.combine import compress, distance
from lamina.engine.compose import Factors


def drawn(
    out: int, rank: int, inner: int, scaling: float = 2.0, dtype: torch.dtype = torch.float32
) -> Factors:
    generator = torch.Generator().manual_seed(out * 97 + rank * 31 + inner)
    a = torch.randn(rank, inner, generator=generator).to(dtype)
    b = torch.randn(out, rank, generator=generator).to(dtype)
    return Factors(a, b, scaling)


def dense(factors: Factors) -> np.ndarray:
    return factors.scaling * (factors.B.double() @ factors.A.double()).numpy()


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 12),
    rank=st.integers(1, 14),
    inner=st.integers(1, 12),
    asked=st.integers(1, 15),
    scaling=st.sampled_from([-1.5, 1e-3, 0.25, 2.0, 300.0]),
)
def test_it_is_the_best_of_that_rank(
    out: int, rank: int, inner: int, asked: int, scaling: float
) -> None:
    whole = drawn(out, rank, inner, scaling)
    made = compress(whole, rank=asked)
    values = np.linalg.svd(dense(whole), compute_uv=False)
    tail = math.sqrt((values[asked:] ** 2).sum())
    norm = math.sqrt((values**2).sum())
    assert made.norm == pytest.approx(norm, rel=1e-9)
    # fp32 factors round; no approximation of that rank is closer than the tail.
    assert made.error == pytest.approx(tail, rel=1e-5, abs=1e-6 * norm)
    assert np.linalg.norm(dense(made.factors) - dense(whole)) == pytest.approx(
        made.error, rel=1e-7, abs=1e-9 * norm
    )
    assert made.factors.rank <= asked
    assert made.factors.scaling == scaling
    if asked >= rank:
        assert made.factors is whole
        assert (made.error, made.energy) == (0.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 12),
    rank=st.integers(1, 12),
    inner=st.integers(1, 12),
    share=st.floats(0.01, 1.0),
)
def test_the_smallest_rank_that_holds_a_share(
    out: int, rank: int, inner: int, share: float
) -> None:
    whole = drawn(out, rank, inner)
    made = compress(whole, energy=share)
    values = np.linalg.svd(dense(whole), compute_uv=False) ** 2
    held = values[: made.factors.rank].sum() / values.sum()
    assert held >= share - 1e-9
    assert made.energy == pytest.approx(held, rel=1e-9)
    if made.factors.rank < rank and made.factors.rank > 1:
        assert values[: made.factors.rank - 1].sum() / values.sum() < share + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rounding_of_stored_factors_is_in_the_error(dtype: torch.dtype) -> None:
    whole = drawn(16, 8, 12, dtype=dtype)
    made = compress(whole, rank=7)
    assert made.factors.A.dtype == made.factors.B.dtype == dtype
    far = np.linalg.norm(dense(made.factors) - dense(whole))
    assert made.error == pytest.approx(far, rel=1e-9)
    tail = np.linalg.svd(dense(whole), compute_uv=False)[7]
    assert made.error >= tail * (1 - 1e-6)


def test_an_update_of_nothing() -> None:
    whole = Factors(torch.randn(4, 6), torch.zeros(5, 4), 2.0)
    made = compress(whole, rank=2)
    assert made.factors.rank == 2
    assert (made.error, made.norm, made.energy) == (0.0, 0.0, 1.0)
    nothing = compress(Factors(torch.randn(4, 6), torch.randn(5, 4), 0.0), rank=2)
    assert (nothing.error, nothing.norm) == (0.0, 0.0)
    assert nothing.factors.A.isfinite().all()


def test_the_shape_of_a_convolution_and_its_bias_stay() -> None:
    whole = Factors(torch.randn(6, 3, 3, 3), torch.randn(8, 3, 1, 1), 0.5, torch.randn(8))
    made = compress(whole, rank=4)
    # Two groups, of two ranks each.
    assert made.factors.A.shape == (4, 3, 3, 3)
    assert made.factors.B.shape == (8, 2, 1, 1)
    assert made.factors.bias is whole.bias
    assert made.error == pytest.approx(distance(whole, made.factors))


def test_distance_is_exact_for_small_differences() -> None:
    one = drawn(20, 5, 30)
    other = Factors(one.A.double(), one.B.double(), 2.0)
    other.B[3, 2] += 1e-13
    expected = 2.0 * 1e-13 * float(one.A[2].double().norm())
    assert distance(one, other) == pytest.approx(expected, abs=2e-13)
    assert distance(one, one) < 1e-12
