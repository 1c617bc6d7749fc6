"""VeLoRA's product: the input is kept for the backward as one number for each of its groups.

Shape suffixes: x_TI has tokens x in; a group is `D = ceil(in / groups)` features, the last ones
padded with zeros. Source: arXiv:2405.17991, equations 1 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def group_size(features: int, num_groups: int) -> int:
    """How many features a group has."""
    return -(-features // num_groups)


def grouped(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """`x` as (tokens, groups, features of a group), padded with zeros."""
    size = group_size(x.shape[-1], num_groups)
    padding = num_groups * size - x.shape[-1]
    padded = F.pad(x, (0, padding)) if padding else x
    return padded.reshape(-1, num_groups, size)


def compress(x: torch.Tensor, direction: torch.Tensor, num_groups: int) -> torch.Tensor:
    """How far each group lies along `direction`: (tokens, groups)."""
    return grouped(x, num_groups) @ direction


def reconstruct(
    compressed: torch.Tensor, direction: torch.Tensor, features: int, scale: float
) -> torch.Tensor:
    """What is known of the input again: (tokens, features), times `scale`."""
    groups = compressed.unsqueeze(-1) * direction
    return groups.flatten(1)[:, :features] * scale


def normalised(direction: torch.Tensor) -> torch.Tensor:
    """The direction with length 1, in fp32; where it is zero, that of the diagonal."""
    direction = direction.float()
    length = torch.linalg.vector_norm(direction)
    if length == 0:
        direction = torch.ones_like(direction)
        length = torch.linalg.vector_norm(direction)
    unit: torch.Tensor = direction / length
    return unit


class VeloraFunction(torch.autograd.Function):
    """`x @ A.T + bias`; the gradient of A is made from the reconstructed input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        direction: torch.Tensor,
        num_groups: int,
        scale: float,
    ) -> torch.Tensor:
        """The product as it is; of `x`, only the compressed form is kept."""
        ctx.shape, ctx.scale = x.shape, scale
        ctx.save_for_backward(compress(x, direction.to(x.dtype), num_groups), weight, direction)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of input, weight and bias; the first and last are exact."""
        (grad,) = grads
        compressed, weight, direction = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = (grad_TO @ weight.to(grad.dtype)).reshape(ctx.shape).to(compressed.dtype)
        if ctx.needs_input_grad[1]:
            known = reconstruct(
                compressed.to(grad.dtype), direction.to(grad.dtype), ctx.shape[-1], ctx.scale
            )
            for_weight = (grad_TO.T @ known).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            for_bias = grad_TO.sum(0)
        return for_x, for_weight, for_bias, None, None, None
