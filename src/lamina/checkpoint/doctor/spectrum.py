"""Norms and singular values of `B A`, from `A A^T` and `B^T B` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lamina.checkpoint.doctor.measure import Pair

if TYPE_CHECKING:
    from numpy.typing import NDArray


def update_norm(pair: Pair) -> float | None:
    """Frobenius norm of `B A`: the root of `trace(A A^T B^T B)`."""
    if pair.gram_A is None or pair.gram_B is None:
        return None
    return float(np.sqrt(max(0.0, float(np.sum(pair.gram_A * pair.gram_B)))))


def singular_values(pair: Pair) -> NDArray[np.float64] | None:
    """Singular values of `B A`, the largest first.

    With `A A^T = L L^T` they are the roots of the eigenvalues of `L^T B^T B L`. The products are
    summed in fp32, so that values below about 1e-3 of the largest are noise.
    """
    if pair.gram_A is None or pair.gram_B is None:
        return None
    root = _root(pair.gram_A)
    squares = np.linalg.eigvalsh(root.T @ pair.gram_B @ root)
    found: NDArray[np.float64] = np.sqrt(np.maximum(squares[::-1], 0.0))
    return found


def _root(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """L with `gram = L L^T`."""
    root: NDArray[np.float64]
    try:
        root = np.linalg.cholesky(gram).astype(np.float64)
    except np.linalg.LinAlgError:
        squares, vectors = np.linalg.eigh(gram)
        root = vectors * np.sqrt(np.maximum(squares, 0.0))
    return root


def ranks_for(values: NDArray[np.float64], share: float) -> int:
    """How many of the largest singular values hold this share of the sum of squares."""
    squares = values**2
    total = float(squares.sum())
    if total <= 0:
        return 0
    return int(np.searchsorted(np.cumsum(squares), share * total) + 1)


def repeated_ranks(pair: Pair, least: float) -> list[tuple[int, int]]:
    """Pairs of ranks of the same direction in A and in B, so that they are one rank in two.

    Args:
        pair: the factors.
        least: the cosine from which directions count as the same.
    """
    if pair.gram_A is None or pair.gram_B is None:
        return []
    cosine_a = _cosines(pair.gram_A)
    cosine_b = _cosines(pair.gram_B)
    # Two that cancel out are how an adapter is written that began with a part of the base.
    same = (np.abs(cosine_a) >= least) & (np.abs(cosine_b) >= least) & (cosine_a * cosine_b > 0)
    rows, columns = np.nonzero(np.triu(same, 1))
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True)]


def _cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.sqrt(np.diagonal(gram))
    scale = np.where(lengths > 0, lengths, np.inf)
    found: NDArray[np.float64] = gram / np.outer(scale, scale)
    return found
