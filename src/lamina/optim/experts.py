"""Factors that hold those of several experts: taken apart, and put together again."""

from __future__ import annotations

import torch
from torch import nn

from lamina.engine.layers.parameter import ParamWrapper


def experts_of(model: nn.Module, layer: str) -> int:
    """How many experts' factors lie side by side in those of a layer."""
    module = model.get_submodule(layer)
    return module.num_experts if isinstance(module, ParamWrapper) else 1


def apart_A(a: torch.Tensor, experts: int) -> torch.Tensor:
    """A of (experts * r x in) as (experts, r, in)."""
    apart: torch.Tensor = a.unflatten(0, (experts, -1))
    return apart


def apart_B(b: torch.Tensor, experts: int) -> torch.Tensor:
    """B of (out x r * experts) as (experts, out, r)."""
    apart: torch.Tensor = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return apart


def together_B(b: torch.Tensor) -> torch.Tensor:
    """(experts, out, r) as (out x r * experts)."""
    return b.permute(1, 2, 0).flatten(1)
