"""The best update of a given rank: singular value decompositions of products and matrices.

A product is decomposed through QR of its factors, which costs O((out + in) * R^2) for R columns
and never forms the matrix. A large matrix is decomposed by a randomised range finder.

Source: Halko, Martinsson and Tropp, arXiv:0909.4061, for the latter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Up to this smaller side the exact decomposition takes well under a second.
_EXACT_UP_TO = 1024
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


@dataclass(frozen=True)
class Truncated:
    """`B @ A` of a chosen rank, and what it leaves out.

    Attributes:
        B: ... x out x rank: the left singular vectors times the singular values.
        A: ... x rank x in: the right singular vectors, orthonormal rows.
        error: Frobenius norm of what is left out, over all leading dimensions.
        norm: Frobenius norm of the whole.
    """

    B: torch.Tensor
    A: torch.Tensor
    error: float
    norm: float


def truncate_product(
    left: torch.Tensor, right: torch.Tensor, rank: int | float, *, driver: str | None = None
) -> Truncated:
    """The best approximation of `left @ right` of this rank.

    Args:
        left: ... x out x R.
        right: ... x R x in.
        rank: of each of the matrices; where they have less, the factors are padded with zeros. A
            float is what the rank has to hold, as in `truncate_dense`.
        driver: the cuSOLVER routine, on CUDA.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    core = r_left @ r_right.mT
    u, s, vh = torch.linalg.svd(core, full_matrices=False, driver=_driver(core, driver))
    wanted = rank if isinstance(rank, int) else rank_of_energy(s, rank)
    kept = min(wanted, s.shape[-1])
    b = q_left @ (u[..., :kept] * s[..., None, :kept])
    a = vh[..., :kept, :] @ q_right.mT
    tail = float(s[..., kept:].double().square().sum())
    whole = float(s.double().square().sum())
    return Truncated(*_padded(b, a, wanted), math.sqrt(tail), math.sqrt(whole))


def truncate_dense(
    matrix: torch.Tensor, rank: int | float, *, driver: str | None = None
) -> Truncated:
    """The best approximation of a matrix, by a rank or by what it has to hold.

    Args:
        matrix: ... x out x in, in fp32 or fp64.
        rank: an int is the rank. A float is the share of the squared Frobenius norm that the
            smallest sufficient rank is to hold; only for a single matrix.
        driver: the cuSOLVER routine, on CUDA.
    """
    u, s, vh = _decomposed(matrix, rank, driver)
    total = float(matrix.double().square().sum())
    wanted = rank if isinstance(rank, int) else rank_of_energy(s, rank, total)
    kept = min(wanted, s.shape[-1])
    held = float(s[..., :kept].double().square().sum())
    error = math.sqrt(max(total - held, 0.0)) if kept < min(matrix.shape[-2:]) else 0.0
    b = u[..., :kept] * s[..., None, :kept]
    return Truncated(*_padded(b, vh[..., :kept, :], wanted), error, math.sqrt(total))


def rank_of_energy(singular: torch.Tensor, share: float, total: float | None = None) -> int:
    """The smallest rank whose squared singular values are at least `share` of all of them."""
    energy = singular.square().cumsum(0)
    reached = torch.searchsorted(energy, share * (energy[-1] if total is None else total))
    return min(int(reached) + 1, len(singular))


def _decomposed(
    matrix: torch.Tensor, rank: int | float, driver: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    side = min(matrix.shape[-2:])
    guess = rank if isinstance(rank, int) else 64
    total = float(matrix.double().square().sum())
    while side > _EXACT_UP_TO and guess + _OVERSAMPLING <= side // 4:
        u, s, vh = randomised(matrix, guess)
        enough = isinstance(rank, int) or float(s.double().square().sum()) >= rank * total
        if enough:
            return u, s, vh
        guess *= 2
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False, driver=_driver(matrix, driver))
    return u, s, vh


def randomised(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triplets, found in the range of `matrix @ noise`; always the same."""
    generator = torch.Generator().manual_seed(0)
    columns = rank + _OVERSAMPLING
    noise = torch.randn(*matrix.shape[:-2], matrix.shape[-1], columns, generator=generator)
    q = torch.linalg.qr(matrix @ noise.to(matrix)).Q
    for _ in range(_POWER_ITERATIONS):
        q = torch.linalg.qr(matrix.mT @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, vh = torch.linalg.svd(q.mT @ matrix, full_matrices=False)
    return (q @ u)[..., :rank], s[..., :rank], vh[..., :rank, :]


def _padded(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = rank - b.shape[-1]
    if missing <= 0:
        return b, a
    return (
        torch.nn.functional.pad(b, (0, missing)),
        torch.nn.functional.pad(a, (0, 0, 0, missing)),
    )


def _driver(matrix: torch.Tensor, driver: str | None) -> str | None:
    return driver if matrix.is_cuda else None
