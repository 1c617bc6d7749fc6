"""The initialisations that need nothing but shapes; B (or A of an embedding) begins at zero.

A_RI is rank x in (further dimensions for convolutions), B_OR is out x rank.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lamina.engine.init.base import Begun


def kaiming(layer: Begun, adapter: str) -> None:
    """A uniform in +-1/sqrt(in), B zero. An embedding: A zero, B standard normal.

    Source: arXiv:2106.09685 and its reference implementation.
    """
    A_RI, B_OR = layer.factors(adapter)
    if layer.is_embedding:
        _embedding(A_RI, B_OR)
        return
    nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5))
    nn.init.zeros_(B_OR)


def gaussian(layer: Begun, adapter: str) -> None:
    """A normal with standard deviation 1/r, B zero."""
    A_RI, B_OR = layer.factors(adapter)
    if layer.is_embedding:
        _embedding(A_RI, B_OR)
        return
    # Not by A's shape: with experts it has their ranks side by side.
    nn.init.normal_(A_RI, std=1 / layer.records[adapter].r)
    nn.init.zeros_(B_OR)


def random(layer: Begun, adapter: str) -> None:
    """Both random, so that the adapter changes the model from the start; for tests."""
    A_RI, B_OR = layer.factors(adapter)
    if layer.is_embedding:
        nn.init.normal_(A_RI)
        nn.init.normal_(B_OR)
        return
    nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5))
    nn.init.kaiming_uniform_(B_OR, a=math.sqrt(5))


def _embedding(A_RI: torch.Tensor, B_OR: torch.Tensor) -> None:
    nn.init.zeros_(A_RI)
    nn.init.normal_(B_OR)
