"""The initialisations that need nothing but shapes; B (or A of an embedding) begins at zero.

A_RI is rank x in (further dimensions for convolutions), B_OR is out x rank. Numbers are drawn on
the CPU in the default dtype, as many and in the order in which peft draws them: the same seed
gives the same adapter on any device, and in either library.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from lamina.engine.init.base import Begun


def as_made(layer: Begun, adapter: str) -> None:
    """Draw what torch's new layers begin with; every initialisation starts from there."""
    A_RI, B_OR = layer.factors(adapter)
    if layer.is_embedding:
        _draw(A_RI, nn.init.normal_)
        _draw(B_OR, nn.init.normal_)
        return
    _draw(A_RI, _uniform)
    _draw(B_OR, _uniform)
    bias = layer.tensors(adapter).get("lora_B.bias")
    if bias is not None:
        bound = 1 / math.sqrt(B_OR[0].numel())
        _draw(bias, lambda values: nn.init.uniform_(values, -bound, bound))


def kaiming(layer: Begun, adapter: str) -> None:
    """A uniform in +-1/sqrt(in), B zero. An embedding: A zero, B standard normal.

    Source: arXiv:2106.09685 and its reference implementation.
    """
    _begin(layer, adapter, _uniform)


def gaussian(layer: Begun, adapter: str) -> None:
    """A normal with standard deviation 1/r, B zero."""
    # Not by A's shape: with experts it has their ranks side by side.
    std = 1 / layer.records[adapter].r
    _begin(layer, adapter, lambda values: nn.init.normal_(values, std=std))


def random(layer: Begun, adapter: str) -> None:
    """Both random, so that the adapter changes the model from the start; for tests."""


def _begin(layer: Begun, adapter: str, fill: Callable[[torch.Tensor], torch.Tensor]) -> None:
    A_RI, B_OR = layer.factors(adapter)
    if layer.is_embedding:
        nn.init.zeros_(A_RI)
        _draw(B_OR, nn.init.normal_)
        return
    _draw(A_RI, fill)
    nn.init.zeros_(B_OR)
    bias = layer.tensors(adapter).get("lora_B.bias")
    if bias is not None:
        nn.init.zeros_(bias)


def _uniform(values: torch.Tensor) -> torch.Tensor:
    return nn.init.kaiming_uniform_(values, a=math.sqrt(5))


def _draw(values: torch.Tensor, fill: Callable[[torch.Tensor], torch.Tensor]) -> None:
    values.data.copy_(
        fill(torch.empty(values.shape, dtype=torch.get_default_dtype(), device="cpu"))
    )
