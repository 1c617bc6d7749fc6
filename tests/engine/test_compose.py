from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.engine.compose import Factors, concatenate, is_power_of_two, rescale, separate

N_IN, N_OUT = 5, 4
ranks = st.integers(1, 4)
powers = st.integers(-6, 6).map(lambda exponent: 2.0**exponent)
# Scalings as alpha / r and alpha / sqrt(r) give them, of either sign.
scalings = st.one_of(
    powers,
    st.builds(
        lambda alpha, r, root, sign: sign * alpha / (math.sqrt(r) if root else r),
        st.integers(1, 64),
        st.integers(1, 64),
        st.booleans(),
        st.sampled_from([1, -1]),
    ),
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def factors(
    draw: st.DrawFn,
    scaling: st.SearchStrategy[float] = scalings,
    dtype: st.SearchStrategy[torch.dtype] = dtypes,
    biased: bool = True,
) -> Factors:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind, rank = draw(dtype), draw(ranks)
    # From fp16's smallest numbers to far above what training gives.
    size = 2.0 ** draw(st.integers(-22, 6))
    a = torch.randn(rank, N_IN, generator=generator).to(kind)
    b = (torch.randn(N_OUT, rank, generator=generator) * size).to(kind)
    bias = (
        torch.randn(N_OUT, generator=generator).to(kind) if biased and draw(st.booleans()) else None
    )
    return Factors(a, b, draw(scaling), bias)


def update(part: Factors) -> torch.Tensor:
    """The dense update in fp64."""
    return part.scaling * (part.B.double() @ part.A.double())


@given(st.lists(factors(), min_size=1, max_size=4), scalings)
def test_a_concatenation_is_the_sum(parts: list[Factors], scaling: float) -> None:
    whole = concatenate(parts, scaling)
    assert whole.scaling == scaling
    assert whole.rank == sum(part.rank for part in parts)
    exact = torch.stack([update(part) for part in parts]).sum(0)
    # Each B is rounded once, to fp32; the dense sums here are in fp64.
    absolute = sum(
        abs(part.scaling) * (part.B.double().abs() @ part.A.double().abs()) for part in parts
    )
    assert ((update(whole) - exact).abs() <= absolute * 2**-23 + 1e-30).all()


@given(st.lists(factors(), min_size=1, max_size=4), scalings)
def test_biases_are_summed(parts: list[Factors], scaling: float) -> None:
    whole = concatenate(parts, scaling)
    biases = [part.scaling * part.bias.double() for part in parts if part.bias is not None]
    if not biases:
        assert whole.bias is None
        return
    assert whole.bias is not None
    size = torch.stack(biases).abs().sum(0)
    error = (scaling * whole.bias.double() - torch.stack(biases).sum(0)).abs()
    assert (error <= size * torch.finfo(whole.bias.dtype).eps).all()


@given(st.lists(factors(powers, biased=False), min_size=1, max_size=4), powers)
def test_by_powers_of_two_parts_come_back_to_the_bit(parts: list[Factors], scaling: float) -> None:
    whole = concatenate(parts, scaling)
    back = separate(whole, [part.rank for part in parts], [part.scaling for part in parts])
    for part, again in zip(parts, back, strict=True):
        assert again.scaling == part.scaling
        assert torch.equal(again.A.double(), part.A.double())
        assert torch.equal(again.B.double(), part.B.double())


@given(
    st.lists(factors(dtype=st.just(torch.float32), biased=False), min_size=1, max_size=4), scalings
)
@settings(max_examples=200)
def test_else_they_come_back_within_one_unit_in_the_last_place(
    parts: list[Factors], scaling: float
) -> None:
    whole = concatenate(parts, scaling)
    back = separate(whole, [part.rank for part in parts], [part.scaling for part in parts])
    for part, again in zip(parts, back, strict=True):
        assert torch.equal(again.A, part.A)
        infinity = torch.full_like(part.B, math.inf)
        above = torch.nextafter(part.B, infinity)
        below = torch.nextafter(part.B, -infinity)
        assert torch.equal(again.B.clamp(below, above), again.B)


@given(factors(biased=False), factors(biased=False))
def test_the_newest_part_is_not_touched(older: Factors, newest: Factors) -> None:
    whole = concatenate([older, newest], newest.scaling)
    assert torch.equal(whole.A[older.rank :], newest.A.to(whole.A.dtype))
    assert torch.equal(whole.B[:, older.rank :], newest.B.to(whole.B.dtype))
    again = concatenate([newest], newest.scaling)
    assert again.B.dtype == newest.B.dtype
    assert torch.equal(again.B, newest.B)


@given(st.lists(factors(biased=False), min_size=3, max_size=3), scalings)
def test_chains_may_be_made_step_by_step(parts: list[Factors], scaling: float) -> None:
    first = concatenate(parts[:2], parts[1].scaling)
    stepwise = concatenate([first, parts[2]], scaling)
    at_once = concatenate(parts, scaling)
    assert torch.equal(stepwise.A.double(), at_once.A.double())
    torch.testing.assert_close(stepwise.B.double(), at_once.B.double(), rtol=3 * 2**-23, atol=1e-30)


def test_half_precision_stays_half_only_where_nothing_is_lost() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        b = torch.tensor([[1.0, 3.140625], [0.333984375, -2.5]]).to(dtype)
        assert rescale(b, 0.25).dtype == dtype
        assert torch.equal(rescale(b, 0.25).double(), b.double() / 4)
        assert rescale(b, 1 / 3).dtype == torch.float32
    # A number near the bottom of fp16's range would lose its last digits, one at the top overflow.
    for value, ratio in ((2.0**-24 * 3, 0.5), (6e4, 2.0)):
        lifted = rescale(torch.tensor([value], dtype=torch.float16), ratio)
        assert lifted.dtype == torch.float32
        assert lifted.double() == torch.tensor([value], dtype=torch.float16).double() * ratio


def test_parts_in_two_half_precisions_meet_in_fp32() -> None:
    one = Factors(torch.ones(1, 2).bfloat16(), torch.ones(2, 1).bfloat16(), 1.0)
    two = Factors(torch.ones(1, 2).half(), torch.ones(2, 1).half(), 1.0)
    assert concatenate([one, two], 1.0).A.dtype == torch.float32
    assert concatenate([one, one], 1.0).A.dtype == torch.bfloat16


def test_convolutions_are_concatenated_along_their_channels() -> None:
    parts = [Factors(torch.randn(r, 3, 2, 2), torch.randn(4, r, 1, 1), 2.0) for r in (1, 3)]
    whole = concatenate(parts, 2.0)
    assert whole.A.shape == (4, 3, 2, 2)
    assert whole.B.shape == (4, 4, 1, 1)
    dense = [part.B.flatten(1) @ part.A.flatten(1) for part in parts]
    torch.testing.assert_close(whole.B.flatten(1) @ whole.A.flatten(1), dense[0] + dense[1])


@pytest.mark.parametrize(
    ("ratio", "yes"), [(1, True), (-2, True), (0.125, True), (3, False), (1 / 3, False)]
)
def test_powers_of_two(ratio: float, yes: bool) -> None:
    assert is_power_of_two(ratio) is yes


def test_ranks_have_to_add_up() -> None:
    whole = Factors(torch.ones(3, 2), torch.ones(2, 3), 1.0)
    with pytest.raises(RuntimeError, match="split"):
        separate(whole, [1, 1], [1.0, 1.0])
