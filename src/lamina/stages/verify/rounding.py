"""Whether a base in fp32 has values that were rounded to something coarser on the way."""

from __future__ import annotations

import torch
from torch import nn

from lamina.engine.names import places

_COARSER = (torch.bfloat16, torch.float16)


def rounded_to(base: nn.Module) -> str | None:
    """The coarser dtype that holds all matrices of a base in fp32 exactly; None if there is none.

    Args:
        base: the base, adapted by now or not.
    """
    weights = [
        weight
        for place in places(base)
        if isinstance(weight := place.original._parameters.get("weight"), torch.Tensor)
        and weight.dim() > 1
    ]
    if not weights or any(weight.dtype != torch.float32 for weight in weights):
        return None
    for dtype in _COARSER:
        if all(_holds(dtype, weight) for weight in weights):
            return str(dtype).removeprefix("torch.")
    return None


@torch.no_grad()
def _holds(dtype: torch.dtype, weight: torch.Tensor) -> bool:
    # A part tells most bases apart before all is read.
    return all(torch.equal(w.to(dtype).to(w.dtype), w) for w in (weight[:1], weight))
