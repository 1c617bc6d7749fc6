"""Fewer ranks for one update: the best that have that many, and what they leave out.

The decomposition goes through QR of the factors, in fp64. What is reported is measured on the
factors as they are stored, so that their own rounding is in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lamina.engine.combine.truncate import rank_of_energy
from lamina.engine.compose import Factors


@dataclass(frozen=True)
class Compressed:
    """An update of fewer ranks.

    Attributes:
        factors: its factors, with the scaling, dtypes and bias of the original; the roots of the
            singular values are on both.
        error: `‖ΔW - ΔW_r‖_F`; 0 where nothing was left out.
        norm: `‖ΔW‖_F`.
        energy: the share of the squared singular values that is kept.
    """

    factors: Factors
    error: float
    norm: float
    energy: float


@torch.no_grad()
def compress(factors: Factors, rank: int | None = None, energy: float | None = None) -> Compressed:
    """The best approximation of `scaling * B @ A` that has a rank, or holds a share of it.

    An update that has no more ranks than that stays as it is, bit for bit.

    Args:
        factors: of the update; those of a grouped convolution have as many ranks in each group.
        rank: the largest rank; None doesn't limit it.
        energy: the share of the squared singular values, up to 1, that the smallest sufficient rank
            is to hold; None asks for all.
    """
    groups = factors.rank // factors.B.shape[1]
    left, right = _blocks(factors, groups)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    whole = float(torch.linalg.vector_norm(s))
    norm = whole * abs(factors.scaling)
    kept = _kept(s, factors.B.shape[1], groups, rank, energy)
    if kept >= factors.B.shape[1]:
        return Compressed(factors, 0.0, norm, 1.0)
    kept = min(kept, s.shape[-1])
    share = float(s[..., :kept].square().sum()) / whole**2 if whole else 1.0
    root = s[..., :kept].sqrt()
    b = q_left @ (u[..., :kept] * root[..., None, :])
    a = (root[..., None] * vh[..., :kept, :]) @ q_right.mT
    stored = Factors(
        A=a.flatten(0, 1).unflatten(1, factors.A.shape[1:]).to(factors.A.dtype).contiguous(),
        B=b.flatten(0, 1).unflatten(1, (kept, *factors.B.shape[2:])).to(factors.B.dtype),
        scaling=factors.scaling,
        bias=factors.bias,
    )
    return Compressed(stored, distance(factors, stored), norm, share)


def distance(one: Factors, other: Factors) -> float:
    """`‖s1 B1 A1 - s2 B2 A2‖_F`, through QR of the factors side by side, in fp64.

    Exact to the rounding of fp64 relative to the larger of the two.
    """
    groups = one.rank // one.B.shape[1]
    (b1, a1), (b2, a2) = _blocks(one, groups), _blocks(other, groups)
    left = torch.cat([b1 * one.scaling, -b2 * other.scaling], dim=-1)
    right = torch.cat([a1, a2], dim=-2)
    r_left = torch.linalg.qr(left, mode="r").R
    r_right = torch.linalg.qr(right.mT, mode="r").R
    return float(torch.linalg.vector_norm(r_left @ r_right.mT))


def _blocks(factors: Factors, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (groups x out/groups x r/groups) and A (groups x r/groups x in), in fp64."""
    b, a = (x.double().flatten(1).unflatten(0, (groups, -1)) for x in (factors.B, factors.A))
    return b, a


def _kept(s: torch.Tensor, most: int, groups: int, rank: int | None, energy: float | None) -> int:
    """Ranks to keep in each group."""
    kept = most if rank is None else min(most, max(rank // groups, 1))
    if energy is not None and energy < 1 and math.isfinite(energy):
        kept = min(kept, rank_of_energy(s.square().sum(0).sqrt(), energy))
    return kept
