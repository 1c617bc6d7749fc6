"""A frozen linear map whose own forward stops gradients, made to pass them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lamina.engine.weights import BaseWeight


class _StraightThrough(torch.autograd.Function):
    """`y = base(x)`, with `dL/dx = dL/dy @ W` for the weight W as it is dequantised."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: Callable[[torch.Tensor], torch.Tensor],
        weight: BaseWeight,
    ) -> torch.Tensor:
        ctx.weight = weight
        ctx.dtype = x.dtype
        return base(x.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight = ctx.weight.read().to(gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None, None


def straight_through(
    x: torch.Tensor, base: Callable[[torch.Tensor], torch.Tensor], weight: BaseWeight
) -> torch.Tensor:
    """A frozen linear layer's output for `x`; gradients reach `x` through its dequantised weight.

    Rounding activations or codes has no gradient: it is taken for the identity.

    Args:
        x: ... x in.
        base: the layer, or a call of it.
        weight: its weight, out x in.

    Source: the straight-through estimator, arXiv:1308.3432.
    """
    result: torch.Tensor = _StraightThrough.apply(x, base, weight)  # type: ignore[no-untyped-call]
    return result
