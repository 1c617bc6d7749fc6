"""What changed in one module, beside dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lamina.checkpoint.difference import (
    effective_rank,
    module_change,
    tensor_change,
    update_size,
)
from lamina.engine.compose import Factors, concatenate


def factors(rank: int, seed: int, scaling: float = 2.0, out: int = 12, n_in: int = 9) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rank, n_in, generator=generator),
        torch.randn(out, rank, generator=generator),
        scaling,
    )


def dense(update: Factors) -> np.ndarray:
    return update.scaling * (update.B.double() @ update.A.double()).numpy()


def test_norms_cosine_and_effective_rank_are_those_of_the_dense_matrices() -> None:
    one, other = factors(3, 0), factors(4, 1, scaling=0.5)
    found = module_change("m", one, other)
    a, b = dense(one), dense(other)
    values = np.linalg.svd(b - a, compute_uv=False)
    shares = values[values > 1e-9] / values.sum()
    assert found.norm_a == pytest.approx(np.linalg.norm(a))
    assert found.norm_b == pytest.approx(np.linalg.norm(b))
    assert found.norm_change == pytest.approx(np.linalg.norm(b - a))
    assert found.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    assert found.cosine == pytest.approx(
        float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    )
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


def test_angles_are_those_of_the_spaces() -> None:
    one, other = factors(2, 0), factors(3, 1)
    found = module_change("m", one, other)
    for angle, transposed in ((found.output_angle, False), (found.input_angle, True)):
        bases = []
        for update in (one, other):
            matrix = dense(update).T if transposed else dense(update)
            bases.append(np.linalg.svd(matrix)[0][:, : update.rank])
        shared = np.linalg.norm(bases[0].T @ bases[1]) ** 2 / 2
        assert angle == pytest.approx(math.degrees(math.acos(math.sqrt(shared))))


def test_spaces_that_are_the_same_and_that_have_nothing_in_common() -> None:
    identity = torch.eye(6)
    one = Factors(identity[:2], identity[:, :2], 1.0)
    turned = Factors(torch.tensor([[0.0, 1.0], [3.0, 0.0]]) @ identity[:2], identity[:, :2], 1.0)
    apart = Factors(identity[2:4], identity[:, 2:4], 1.0)
    same, none = module_change("m", one, turned), module_change("m", one, apart)
    assert (same.output_angle, same.input_angle) == (pytest.approx(0), pytest.approx(0))
    assert (none.output_angle, none.input_angle) == (pytest.approx(90), pytest.approx(90))
    assert none.cosine == pytest.approx(0)
    assert none.effective_rank == pytest.approx(4)


def test_of_an_update_that_was_built_on_another_the_new_part_is_looked_at() -> None:
    identity = torch.eye(6)
    one = Factors(identity[:2], identity[:, :2], 1.0)
    added = Factors(identity[2:4], identity[:, 2:4], 0.7)
    whole = concatenate([one, added], 0.7)
    found = module_change("m", one, whole, built_on=True)
    assert found.output_angle == pytest.approx(90)
    assert found.norm_change == pytest.approx(0.7 * math.sqrt(2))
    assert found.effective_rank == pytest.approx(2)
    assert module_change("m", one, whole).output_angle == pytest.approx(0)


def test_the_rounding_of_a_file_is_no_change() -> None:
    one = factors(3, 0, scaling=1.0)
    other = Factors(one.A, one.B / 3, 3.0)
    assert not torch.equal(other.B * 3, one.B)
    found = module_change("m", one, other)
    assert (found.norm_change, found.effective_rank) == (0, 0)
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize("missing", ["a", "b"])
def test_an_update_that_only_one_side_has(missing: str) -> None:
    update = factors(3, 0)
    pair = (None, update) if missing == "a" else (update, None)
    found = module_change("m", *pair)
    norm = pytest.approx(np.linalg.norm(dense(update)))
    assert found.norm_change == norm
    assert (found.norm_a, found.norm_b) == ((0, norm) if missing == "a" else (norm, 0))
    assert (found.cosine, found.output_angle, found.input_angle) == (None, None, None)
    assert (found.relative is None) == (missing == "a")


def test_an_update_of_zeros_has_no_direction() -> None:
    zero = Factors(torch.randn(2, 9), torch.zeros(12, 2), 1.0)
    found = module_change("m", zero, factors(2, 1))
    assert (found.norm_a, found.cosine, found.output_angle) == (0, None, None)


def test_experts_are_compared_one_by_one() -> None:
    experts, rank = 3, 2
    one, other = (factors(rank * experts, seed, scaling=0.5) for seed in (0, 1))

    def per_expert(update: Factors) -> torch.Tensor:
        a = update.A.double().reshape(experts, rank, 9)
        b = update.B.double().reshape(12, rank, experts)
        return 0.5 * torch.einsum("ore,eri->eoi", b, a)

    found = module_change("m", one, other, blocks=experts)
    assert found.norm_a == pytest.approx(float(per_expert(one).norm()))
    assert found.norm_change == pytest.approx(float((per_expert(other) - per_expert(one)).norm()))


def test_a_convolution_with_groups_is_a_stack_of_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 3, 2, 2, generator=generator)
    b = torch.randn(8, 2, 1, 1, generator=generator)
    found = module_change("m", None, Factors(a, b, 1.0))
    blocks = [b[4 * g : 4 * g + 4].flatten(1) @ a[2 * g : 2 * g + 2].flatten(1) for g in (0, 1)]
    assert found.norm_b == pytest.approx(float(torch.stack(blocks).norm()), rel=1e-6)


def test_updates_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        module_change("m", factors(2, 0), factors(2, 0, out=13))
    with pytest.raises(ValueError, match="no update"):
        module_change("m", None, None)


@pytest.mark.parametrize(
    ("shape_a", "shape_b", "blocks"),
    [((6, 9), (12, 6, 1), 3), ((4, 9), (12, 3), 1), ((4,), (3, 4), 1)],
)
def test_factors_that_are_no_update_are_named(
    shape_a: tuple[int, ...], shape_b: tuple[int, ...], blocks: int
) -> None:
    broken = Factors(torch.ones(shape_a), torch.ones(shape_b), 1.0)
    with pytest.raises(ValueError, match="m: factors of shapes"):
        module_change("m", broken, None, blocks=blocks)


def test_tensors_trained_whole() -> None:
    one, other = torch.ones(4), torch.full((4,), 3.0)
    found = tensor_change("score.weight", one, other)
    assert (found.norm_a, found.norm_b, found.norm_change) == (2, 6, 4)
    assert tensor_change("t", one, None).norm_change is None
    assert tensor_change("t", one, torch.ones(5)).norm_change is None


def test_an_update_beside_another_shares_the_squared_cosine_of_their_angle() -> None:
    one, other = factors(2, 0), factors(3, 1)
    found = update_size(other, one)
    change = module_change("m", one, other)
    values = np.linalg.svd(dense(other), compute_uv=False)[:3]
    shares = values / values.sum()
    assert found.norm == pytest.approx(np.linalg.norm(dense(other)))
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert found.rank == 3
    for share, angle in (
        (found.output_overlap, change.output_angle),
        (found.input_overlap, change.input_angle),
    ):
        assert angle is not None
        assert share == pytest.approx(math.cos(math.radians(angle)) ** 2)
    alone = update_size(factors(12, 2))
    assert (alone.rank, alone.output_overlap, alone.input_overlap) == (9, None, None)


def test_the_effective_rank_of_a_dense_matrix() -> None:
    assert effective_rank(torch.eye(5)[:, :3]) == pytest.approx(3)
    assert effective_rank(torch.zeros(2, 2)) == 0
