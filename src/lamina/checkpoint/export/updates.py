"""An adapter's updates as numbers: read, brought to one scaling, compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lamina.checkpoint.adapter import read_adapter
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.origin import plain_key
from lamina.engine.combine import distance
from lamina.engine.compose import Factors, rescale
from lamina.storage.source import PathOrId


@dataclass(frozen=True)
class Updates:
    """What a target is written from.

    Attributes:
        contents: what the adapter consists of.
        factors: plain module name -> A (r x in; of an embedding r x rows), B (out x r), scaling.
        others: all other tensors, by their names in the file.
    """

    contents: Contents
    factors: dict[str, Factors]
    others: dict[str, torch.Tensor]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return self.contents.rank


def read_updates(path_or_id: PathOrId, contents: Contents, **where: Any) -> Updates:
    """Read the tensors of an adapter whose contents are known; arguments as `read_adapter`."""
    tensors = {
        plain_key(key): tensor for key, tensor in read_adapter(path_or_id, **where).tensors.items()
    }
    factors = {}
    for each in contents.factors:
        a, b = (tensors.pop(plain_key(key)) for key in each.keys)
        factors[each.module] = Factors(a, b, contents.scaling(each))
    return Updates(contents, factors, tensors)


def one_scaling(updates: Updates) -> tuple[dict[str, Factors], float]:
    """The same updates, all with the scaling that most have; B of the others takes the ratio in.

    B is rounded once, in fp32 where half precision would lose digits; not at all where the ratio
    is a power of two.
    """
    # A program may take 0 for "no scaling".
    counted = Counter(each.scaling for each in updates.factors.values() if each.scaling)
    scaling = counted.most_common(1)[0][0] if counted else 1.0
    return {name: with_scaling(each, scaling) for name, each in updates.factors.items()}, scaling


def with_scaling(factors: Factors, scaling: float) -> Factors:
    """The same update with another number in front; B takes the ratio in, rounded once."""
    if factors.scaling == scaling:
        return factors
    ratio = factors.scaling / scaling
    return Factors(factors.A, rescale(factors.B, ratio), scaling)


def in_dtype(factors: Factors, dtype: torch.dtype | None) -> Factors:
    """A and B in one dtype; None takes the wider of theirs."""
    wanted = dtype or torch.promote_types(factors.A.dtype, factors.B.dtype)
    return replace(factors, A=factors.A.to(wanted), B=factors.B.to(wanted))


def loses_digits(updates: Updates, dtype: torch.dtype | None) -> bool:
    """Whether any entry of a factor is another number in this dtype."""
    if dtype is None:
        return False
    return not all(
        torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
        for each in updates.factors.values()
        for tensor in (each.A, each.B)
    )


def padded(factors: Factors, rank: int) -> Factors:
    """The same update with a larger rank: zeros are added to A and B."""
    missing = rank - factors.rank
    if missing <= 0:
        return factors
    pad = torch.nn.functional.pad
    return replace(factors, A=pad(factors.A, (0, 0, 0, missing)), B=pad(factors.B, (0, missing)))


def largest_difference(
    expected: Mapping[str, Factors], actual: Mapping[str, Factors]
) -> tuple[float, str | None]:
    """The largest `relative_difference` over all modules, and in which it is.

    A module that only one of the two has counts as different altogether.
    """
    worst: tuple[float, str | None] = (0.0, None)
    for module in sorted({*expected, *actual}):
        one, other = expected.get(module), actual.get(module)
        found = 1.0 if one is None or other is None else relative_difference(one, other)
        # NaN is worse than any number.
        if not found <= worst[0]:
            worst = (found, module)
    return worst


def relative_difference(expected: Factors, actual: Factors) -> float:
    """`‖dW_1 - dW_2‖_F / ‖dW_1‖_F` in fp64, where dW = scaling * B @ A; NaN if not finite."""
    tensors = (expected.A, expected.B, actual.A, actual.B)
    if not all(tensor.isfinite().all() for tensor in tensors):
        return float("nan")
    if expected.scaling == actual.scaling and _equal(expected, actual):
        return 0.0
    norm = distance(expected, replace(expected, B=torch.zeros_like(expected.B)))
    return distance(expected, actual) / (norm or 1.0)


def _equal(one: Factors, other: Factors) -> bool:
    pairs = ((one.A, other.A), (one.B, other.B))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
