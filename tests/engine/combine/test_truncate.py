from __future__ import annotations

import pytest
import torch

from lamina.engine.combine import truncate, truncate_dense, truncate_product
from lamina.engine.combine.truncate import randomised, rank_of_energy


def matrix(rows: int, columns: int, rank: int, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right, rest = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, rank), (rank, columns), (rows, columns))
    )
    return left @ right + noise * rest


@pytest.mark.parametrize("rank", [1, 3, 6, 20])
def test_a_product_and_its_matrix_are_truncated_alike(rank: int) -> None:
    left, right = matrix(9, 6, 6), matrix(6, 12, 6, seed=1)
    product, whole = truncate_product(left, right, rank), truncate_dense(left @ right, rank)
    torch.testing.assert_close(product.B @ product.A, whole.B @ whole.A)
    assert product.B.shape == (9, rank)
    assert product.A.shape == (rank, 12)
    tail = torch.linalg.svdvals(left @ right)[rank:]
    for found in (product, whole):
        assert found.error == pytest.approx(float(tail.norm()), abs=1e-6)
        assert found.norm == pytest.approx(float((left @ right).norm()))


def test_the_rank_may_be_chosen_by_what_it_holds() -> None:
    singular = torch.tensor([3.0, 2.0, 1.0, 0.0])
    # Shares of 14: 9, 13, 14, 14.
    for share, rank in ((0.5, 1), (0.65, 2), (0.92, 2), (0.93, 3), (1.0, 3)):
        assert rank_of_energy(singular, share) == rank
    found = truncate_dense(torch.diag(singular), 0.92)
    assert found.B.shape == (4, 2)
    assert found.error == pytest.approx(1.0)


@pytest.mark.parametrize("rank", [8, 0.95])
def test_a_large_matrix_is_decomposed_at_random_and_as_well(
    rank: int | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = matrix(300, 400, 8, noise=0.05)
    wanted = truncate_dense(whole, rank)
    monkeypatch.setattr(truncate, "_EXACT_UP_TO", 100)
    found = truncate_dense(whole, rank)
    assert found.B.shape == wanted.B.shape
    torch.testing.assert_close(found.B @ found.A, wanted.B @ wanted.A, rtol=1e-5, atol=1e-5)
    assert found.error == pytest.approx(wanted.error, rel=1e-5)
    again = truncate_dense(whole, rank)
    assert torch.equal(found.B, again.B)


def test_where_a_share_needs_most_ranks_the_decomposition_is_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = matrix(120, 130, 1, noise=1.0)
    wanted = truncate_dense(whole, 0.95)
    monkeypatch.setattr(truncate, "_EXACT_UP_TO", 10)
    assert truncate_dense(whole, 0.95).B.shape == wanted.B.shape


def test_random_triplets_are_the_leading_ones() -> None:
    whole = matrix(200, 150, 5, noise=0.01)
    _, s, _ = randomised(whole, 5)
    torch.testing.assert_close(s, torch.linalg.svdvals(whole)[:5], rtol=1e-6, atol=1e-6)
