"""Which dtype adapter weights have, and what a layer's input and output are cast to.

- Adapter weights are fp32 over a base in half precision or quantised, because updates smaller
  than a half-precision step are lost in training; else they have the base's dtype.
- An adapter's input is cast to its weights' dtype, except under autocast, which casts by itself.
- A layer's output has the dtype of the base's output.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_HALF = (torch.float16, torch.bfloat16)


def adapter_dtype(base: torch.dtype, *, upcast: bool = True) -> torch.dtype:
    """The dtype of new adapter weights over base weights of dtype `base`.

    Args:
        base: the base weight's dtype; integers and 8-bit floats stand for a quantised base.
        upcast: keep half-precision adapters in fp32; False gives them the base's dtype.
    """
    if not base.is_floating_point or base.itemsize < 2:
        return torch.float32
    return torch.float32 if upcast and base in _HALF else base


def to_adapter_input(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` as an adapter with weights of `dtype` takes it."""
    if x.dtype == dtype or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
        return x
    return x.to(dtype)


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, products on `device` are in their own dtype although the caller is in autocast."""
    # Turning off what is off takes as long as a small product.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where updates to weights of `dtype` are summed, before the one rounding at the end."""
    return torch.float64 if dtype == torch.float64 else torch.float32
