from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.engine.combine import METHODS, Part, Settings, combine, method_of
from lamina.engine.compose import Factors
from lamina.errors import ConfigError
from tests import models

WHOLE = Settings(density=1.0)


def part(
    rank: int, weight: float = 1.0, scaling: float = 2.0, seed: int = 0, groups: int = 1
) -> Part:
    """A linear layer from 10 to 8, or a convolution of 5 to 8 channels with a kernel of 2."""
    with models.seeded(seed):
        if groups == 1:
            return Part(Factors(torch.randn(rank, 10), torch.randn(8, rank), scaling), weight)
        a, b = torch.randn(rank, 5, 2), torch.randn(8, rank // groups, 1)
    return Part(Factors(a, b, scaling), weight)


def dense(factors: Factors) -> Tensor:
    """`scaling * B @ A` in fp64, group by group."""
    groups = factors.A.shape[0] // factors.B.shape[1]
    rows = factors.A.double().flatten(1).chunk(groups)
    lifts = factors.B.double().flatten(1).chunk(groups)
    return factors.scaling * torch.cat([b @ a for b, a in zip(lifts, rows, strict=True)])


def total(parts: list[Part]) -> Tensor:
    return torch.stack([each.weight * dense(each.factors) for each in parts]).sum(0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_one_adapter_with_weight_one_comes_back(name: str, groups: int) -> None:
    one = part(4, scaling=0.75, groups=groups)
    made = combine([one], method_of(name), WHOLE)
    torch.testing.assert_close(dense(made.factors), dense(one.factors), rtol=1e-5, atol=1e-5)
    assert made.exact
    assert made.error == 0
    assert made.norm == pytest.approx(float(dense(one.factors).norm()))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_the_reported_error_is_the_difference_from_the_sum(name: str, groups: int) -> None:
    parts = [part(4, 0.7, 2.0, 1, groups), part(4, -1.3, 0.5, 2, groups)]
    made = combine(parts, method_of(name), Settings(density=0.5))
    wanted = total(parts)
    error = float((dense(made.factors) - wanted).norm())
    assert made.norm == pytest.approx(float(wanted.norm()), rel=1e-6)
    if made.exact:
        assert error < 1e-5 * made.norm
    else:
        assert made.error == pytest.approx(error, rel=1e-4)
        assert made.error > 1e-3 * made.norm
    assert made.exact is (name == "cat")


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 9),
    st.floats(-3, 3),
    st.floats(-3, 3),
)
@settings(max_examples=50)
def test_svd_is_the_best_of_its_rank(
    first: int, second: int, rank: int, weight: float, other: float
) -> None:
    parts = [part(first, weight, seed=1), part(second, other, seed=2)]
    made = combine(parts, method_of("svd"), Settings(rank=rank))
    wanted = total(parts)
    singular = torch.linalg.svdvals(wanted)
    best = float(singular[rank:].norm())
    assert made.factors.rank == rank
    size = float(singular.norm()) + 1e-6
    assert abs(float((dense(made.factors) - wanted).norm()) - best) <= 1e-5 * size
    assert made.exact is (rank >= first + second)


def test_grouped_convolutions_are_decomposed_group_by_group() -> None:
    parts = [part(4, seed=1, groups=2), part(4, seed=2, groups=2)]
    made = combine(parts, method_of("svd"), Settings(rank=4))
    assert made.factors.A.shape == (4, 5, 2)
    assert made.factors.B.shape == (8, 2, 1)
    tails = [torch.linalg.svdvals(block)[2:].norm() for block in total(parts).chunk(2)]
    assert made.error == pytest.approx(float(torch.stack(tails).norm()), rel=1e-5)


def test_linear_multiplies_every_a_with_every_b() -> None:
    one, other = part(3, 0.5, 2.0, 1), part(3, -2.0, 0.5, 2)
    made = combine([one, other], method_of("linear"), Settings())
    a = one.factors.A - other.factors.A
    b = one.factors.B + other.factors.B
    torch.testing.assert_close(dense(made.factors), (b @ a).double(), rtol=1e-5, atol=1e-5)


def test_opposite_adapters_cancel() -> None:
    parts = [part(3, 1.0), part(3, -1.0)]
    for name in ("cat", "linear", "svd"):
        made = combine(parts, method_of(name), Settings())
        assert dense(made.factors).norm() < 1e-4


def test_biases_are_summed_whatever_the_method() -> None:
    parts = [part(3, 0.5, 2.0, 1), part(3, -1.0, 4.0, 2)]
    biased = [
        replace(p, factors=replace(p.factors, bias=torch.full((8,), value)))
        for p, value in zip(parts, (1.0, 10.0), strict=True)
    ]
    for name in METHODS:
        made = combine(biased, method_of(name), Settings(density=0.5))
        assert made.factors.bias is not None
        torch.testing.assert_close(made.factors.bias, torch.full((8,), 1.0 - 40.0))


def test_an_update_that_is_no_product_is_taken_as_it_is() -> None:
    one = part(2, 2.0, seed=1)
    update = torch.randn(8, 10, generator=torch.Generator().manual_seed(3))
    made = combine([Part(one.factors, 2.0, update)], method_of("svd"), Settings(rank=3))
    u, s, vh = torch.linalg.svd(2 * update.double())
    torch.testing.assert_close(dense(made.factors), u[:, :3] * s[:3] @ vh[:3], rtol=1e-4, atol=1e-4)
    assert made.error == pytest.approx(float(s[3:].norm()), rel=1e-5)
    assert not made.exact


@pytest.mark.parametrize("name", ["svd", "linear", "ties_svd", "cat"])
def test_half_precision_is_summed_in_fp32_and_rounded_once(name: str) -> None:
    parts = [part(3, 0.5, 2.0, 1), part(3, 1.0, 4.0, 2)]
    half = [
        Part(Factors(p.factors.A.bfloat16(), p.factors.B.bfloat16(), p.factors.scaling), p.weight)
        for p in parts
    ]
    lifted = [
        Part(Factors(p.factors.A.float(), p.factors.B.float(), p.factors.scaling), p.weight)
        for p in half
    ]
    made, wanted = (combine(x, method_of(name), WHOLE).factors for x in (half, lifted))
    assert made.A.dtype == torch.bfloat16
    assert torch.equal(made.A, wanted.A.bfloat16())
    assert torch.equal(made.B, wanted.B.bfloat16())


@pytest.mark.parametrize("name", ["lineal", "dare", None])
def test_an_unknown_method_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="Invalid combination_type") as caught:
        method_of(name)
    if name == "lineal":
        assert "'linear'" in str(caught.value)
