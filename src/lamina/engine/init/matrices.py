"""A base weight as a matrix (out x in), and what can be wrong with it for a factorisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lamina.engine.dtypes import accumulation_dtype
from lamina.engine.init.base import Begun, Fault, Numbers
from lamina.engine.weights import DenseWeight, OpaqueWeight, weight_of


def matrix(layer: Begun) -> torch.Tensor:
    """The base's weight, out x in, in the dtype that sums are in; not to be written into."""
    values = layer.weight_view.read()
    values = values.to(accumulation_dtype(values.dtype))
    # Both an embedding's table and a Conv1D's weight lie (in x out).
    lies_across = layer.is_embedding or getattr(layer, "fan_in_fan_out", False)
    return values.T if lies_across else values


def put(layer: Begun, adapter: str, A_RI: torch.Tensor, B_OR: torch.Tensor) -> None:
    """Write the factors, rounded once to their dtypes."""
    A, B = layer.factors(adapter)
    A.copy_(A_RI)
    B.copy_(B_OR)


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values as the base's dtype has them, where that is a floating one."""
    return values.to(dtype) if dtype.is_floating_point and dtype.itemsize >= 2 else values


def smallest_side(base: nn.Module) -> int:
    """The largest rank that the weight can have, however it is stored."""
    for names in (("in_features", "out_features"), ("num_embeddings", "embedding_dim")):
        sizes = [getattr(base, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return min(int(size) for size in sizes if size is not None)
    weight: torch.Tensor = base.weight  # type: ignore[assignment]
    return int(min(weight.shape))


def why_not_factorised(
    method: str, *, dense: bool = True, ranks: Callable[[int], int] = lambda r: r
) -> Callable[[str, nn.Module, Numbers], Fault | None]:
    """What keeps a linear layer's weight from being factorised.

    Args:
        method: its name in messages.
        dense: whether only an ordinary floating-point weight will do.
        ranks: rank of the adapter -> rank that the weight has to have at least.
    """

    def why_not(kind: str, base: nn.Module, record: Numbers) -> Fault | None:
        if kind != "linear":
            return None
        return unreadable(method, base, dense=dense) or too_high(method, base, ranks(record.r))

    return why_not


def unreadable(method: str, base: nn.Module, *, dense: bool) -> Fault | None:
    """The fault if a weight can't be read as finite numbers."""
    view = weight_of(base)
    if view.device.type == "meta":
        # There is nothing to initialise yet, and nothing that could be changed later.
        return None
    if isinstance(view, OpaqueWeight) or (dense and not isinstance(view, DenseWeight)):
        what = f"float32, float16, or bfloat16, and this is a {type(base).__name__}"
        return Fault(
            f"Please initialize {method} under {what} with values of dtype {view.dtype}",
            "load the base in bf16 or fp32, and quantise the residual model afterwards",
        )
    if isinstance(view, DenseWeight) and not bool(torch.isfinite(view.read()).all()):
        return Fault("its weight has NaN or Inf in it", "load the base's weights again")
    return None


def too_high(method: str, base: nn.Module, rank: int) -> Fault | None:
    """The fault if a weight has no such rank."""
    side = smallest_side(base)
    if rank <= side:
        return None
    return Fault(
        f"{method} requires `r` <= min(in_features, out_features) = {side}, and takes {rank} "
        "directions of the weight",
        "lower r, or r for these layers by rank_pattern",
    )
