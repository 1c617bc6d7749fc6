"""peft's parametrizations of parameters that have adapters.

Lamina puts a sum of low-rank terms in a parameter's place and never makes it whole where the module
can do without. Who replaces a proxy's `forward`, to see or change the whole parameter, gets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lamina.engine.dtypes import accumulation_dtype, exact


class _LoraParameterProxy(nn.Module):
    """`W + delta_weight`."""

    def __init__(self, delta_weight: torch.Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        """The sum, in the dtype of `W` and within its range."""
        wide = accumulation_dtype(W.dtype)
        total = W.to(wide) + self.delta_weight.to(wide)
        if W.dtype.itemsize < 2:
            limits = torch.finfo(W.dtype)
            total = total.clamp(limits.min, limits.max)
        return total.to(W.dtype)


class _LoraFactorsProxy(nn.Module):
    """`W + scaling * lhs @ rhs`, for the experts of a layer at once."""

    def __init__(self, lhs: torch.Tensor, rhs: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.lhs, self.rhs, self.scaling = lhs, rhs, scaling

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        """The sum, in the dtype of `W`, whatever autocast says."""
        with exact(W.device):
            update = self.lhs.to(W.dtype) @ self.rhs.to(W.dtype)
            return torch.add(W, update, alpha=self.scaling)


_original = _LoraFactorsProxy.forward


def is_replaced() -> bool:
    """Whether somebody wants to be called with whole parameters."""
    return _LoraFactorsProxy.forward is not _original


@contextmanager
def folding(
    module: nn.Module, name: str, lhs: torch.Tensor, rhs: torch.Tensor, scaling: float
) -> Iterator[None]:
    """Have a parameter whole inside, with an update in it; computed once to see, once to use."""
    parameter: Any = getattr(module, name)
    grad = parameter.requires_grad
    parametrize.register_parametrization(module, name, _LoraFactorsProxy(lhs, rhs, scaling))
    try:
        with parametrize.cached():
            yield
    finally:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        getattr(module, name).requires_grad_(grad)
