"""Combine the updates of one layer by a method, and measure what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lamina.engine.combine.methods import Method, Settings
from lamina.engine.combine.truncate import truncate_dense, truncate_product
from lamina.engine.compose import Factors, concatenate
from lamina.engine.dtypes import accumulation_dtype


@dataclass(frozen=True)
class Part:
    """One adapter's share of a layer.

    Attributes:
        factors: its factors there.
        weight: how often it counts; negative takes it away.
        update: the dense update, out x everything else, where it is not `scaling * B @ A`.
    """

    factors: Factors
    weight: float
    update: torch.Tensor | None = None

    @property
    def factor(self) -> float:
        """What `B @ A` is multiplied by."""
        return self.weight * self.factors.scaling


@dataclass(frozen=True)
class Combined:
    """The one update of a layer, with the scaling 1.

    Attributes:
        factors: its factors.
        exact: nothing is left out; the update is the weighted sum up to the rounding of numbers.
        error: Frobenius norm of its difference from the weighted sum; 0 where exact.
        norm: Frobenius norm of the weighted sum.
    """

    factors: Factors
    exact: bool
    error: float
    norm: float


@torch.no_grad()
def combine(parts: Sequence[Part], method: Method, settings: Settings) -> Combined:
    """`sum_i w_i * s_i * B_i @ A_i` as one update, exactly or by the method's approximation.

    Biases of B are summed exactly, whatever the method.

    Args:
        parts: at least one; adapters that aren't in this layer are left out, which is what an
            update of zero would give with every method.
        method: a row of `METHODS`.
        settings: its numbers.
    """
    if method.on == "ranks":
        return _side_by_side(parts)
    a, b = (
        _merged_factors(parts, method, settings)
        if method.on == "factors"
        else _truncated(parts, method, settings)
    )
    first = parts[0].factors
    dtype = _widest(parts)
    factors = Factors(
        A=a.reshape(-1, *first.A.shape[1:]).to(dtype).contiguous(),
        B=b.reshape(first.B.shape[0], -1, *first.B.shape[2:]).to(dtype).contiguous(),
        scaling=1.0,
        bias=_bias(parts, dtype),
    )
    error, norm = _measure(parts, factors)
    exact = _nothing_left_out(parts, method, settings, factors.rank)
    return Combined(factors, exact, 0.0 if exact else error, norm)


def _side_by_side(parts: Sequence[Part]) -> Combined:
    weighted = [Factors(p.factors.A, p.factors.B, p.factor, p.factors.bias) for p in parts]
    whole = concatenate(weighted, 1.0)
    return Combined(whole, True, 0.0, _norm(*_sum(parts)))


def _nothing_left_out(parts: Sequence[Part], method: Method, settings: Settings, rank: int) -> bool:
    if any(part.update is not None for part in parts) or settings.clamp is not None:
        return False
    pruned = method.takes_density and (settings.density or 1) < 1
    if pruned or (len(parts) > 1 and method.name not in ("svd", "cat")):
        return False
    return rank >= sum(part.factors.rank for part in parts)


def _merged_factors(
    parts: Sequence[Part], method: Method, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B each for itself; the sign of a weight goes to A only."""
    roots = [math.sqrt(abs(part.factor)) for part in parts]
    signed = [math.copysign(root, part.factor) for root, part in zip(roots, parts, strict=True)]
    blocks = [_blocks(part.factors) for part in parts]
    a = method.merge([a for a, _ in blocks], signed, settings)
    b = method.merge([b for _, b in blocks], roots, settings)
    return a, b


def _truncated(
    parts: Sequence[Part], method: Method, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    rank = settings.rank or max(part.factors.rank for part in parts)
    rank //= _groups(parts[0].factors)
    on_factors = method.name == "svd" and all(part.update is None for part in parts)
    if on_factors and settings.clamp is None:
        b, a = (x.double() for x in _sum(parts))
        found = truncate_product(b, a, rank, driver=settings.driver)
    else:
        merged = method.merge(
            [_dense(part) for part in parts], [part.weight for part in parts], settings
        )
        found = truncate_dense(merged, rank, driver=settings.driver)
    return _clamped(found.A, found.B, settings.clamp)


def _clamped(
    a: torch.Tensor, b: torch.Tensor, quantile: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if quantile is None:
        return a, b
    entries = torch.cat([b.flatten(), a.flatten()]).float()
    # torch.quantile refuses large inputs; this is the same by linear interpolation.
    place = quantile * (entries.numel() - 1)
    low, high = math.floor(place), math.ceil(place)
    values = entries.sort().values
    bound = float(torch.lerp(values[low], values[high], place - low))
    return a.clamp(-bound, bound), b.clamp(-bound, bound)


# --- what a combination is measured by -----------------------------------------------------------


def _measure(parts: Sequence[Part], result: Factors) -> tuple[float, float]:
    """(norm of the difference from the weighted sum, norm of the weighted sum)."""
    a, b = _blocks(result, torch.float64)
    if any(part.update is not None for part in parts):
        total = sum(part.weight * _dense(part).double() for part in parts)
        assert isinstance(total, torch.Tensor)
        return float((b @ a - total).norm()), float(total.norm())
    wanted_b, wanted_a = (x.double() for x in _sum(parts))
    difference = _norm(torch.cat([wanted_b, -b], dim=-1), torch.cat([wanted_a, a], dim=-2))
    return difference, _norm(wanted_b, wanted_a)


def _norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """Frobenius norm of `B @ A`, from the inner products of the factors."""
    b, a = b.double(), a.double()
    return math.sqrt(max(float(((b.mT @ b) * (a @ a.mT)).sum()), 0.0))


# --- shapes --------------------------------------------------------------------------------------


def _groups(factors: Factors) -> int:
    return factors.rank // factors.B.shape[1]


def _blocks(
    factors: Factors, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A as groups x r/groups x in, B as groups x out/groups x r/groups, at least in fp32.

    All but grouped convolutions have one group. The entries keep their order in memory.
    """
    groups = _groups(factors)
    dtype = dtype or accumulation_dtype(factors.A.dtype)
    a, b = (x.to(dtype).flatten(1).unflatten(0, (groups, -1)) for x in (factors.A, factors.B))
    return a, b


def _sum(parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum as one product: B (with the weights) and A."""
    blocks = [_blocks(part.factors) for part in parts]
    weighted = [b * part.factor for (_, b), part in zip(blocks, parts, strict=True)]
    return torch.cat(weighted, dim=-1), torch.cat([a for a, _ in blocks], dim=-2)


def _dense(part: Part) -> torch.Tensor:
    """The part's update without its weight: groups x out/groups x in."""
    if part.update is not None:
        whole: torch.Tensor = part.update.flatten(1).unflatten(0, (_groups(part.factors), -1))
        return whole
    a, b = _blocks(part.factors)
    return b @ a * part.factors.scaling


def _bias(parts: Sequence[Part], dtype: torch.dtype) -> torch.Tensor | None:
    biases = [p.factors.bias.double() * p.factor for p in parts if p.factors.bias is not None]
    return torch.stack(biases).sum(0).to(dtype) if biases else None


def _widest(parts: Sequence[Part]) -> torch.dtype:
    dtype = parts[0].factors.A.dtype
    for tensor in (x for part in parts for x in (part.factors.A, part.factors.B)):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
