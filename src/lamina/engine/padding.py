"""Factors of a larger rank that give the same update: padded with zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.engine.layers import LoraLayer


def groups_of(layer: LoraLayer) -> int:
    """How many groups of channels a layer has; 1 but for grouped convolutions."""
    return int(getattr(layer.get_base_layer(), "groups", 1))


def padded(factor: torch.Tensor, leaf: str, rank: int, groups: int = 1) -> torch.Tensor:
    """A (rank x in) with more rows, or B (out x rank/groups) with more columns, of zeros.

    Each group of a convolution has a block of ranks of its own, at whose end the zeros go.

    Args:
        factor: A or B.
        leaf: which of them, by its name on disk.
        rank: the rank of the layer afterwards.
        groups: of a convolution.
    """
    if leaf.startswith(("lora_B", "lora_embedding_B")):
        wide = factor.new_zeros(factor.shape[0], rank // groups, *factor.shape[2:])
        wide[:, : factor.shape[1]] = factor
        return wide
    blocks = factor.unflatten(0, (groups, -1))
    tall = factor.new_zeros(groups, rank // groups, *factor.shape[1:])
    tall[:, : blocks.shape[1]] = blocks
    return tall.flatten(0, 1)


def set_factor(layer: LoraLayer, adapter: str, leaf: str, value: torch.Tensor) -> None:
    """Put a factor of another rank into its place, and tell the module that holds it."""
    layer.assign(adapter, leaf, value)
    place = leaf.partition(".")[0]
    holder: Any = getattr(layer, place)[adapter]
    if not isinstance(holder, nn.Module):
        return
    is_b = place == "lora_B"
    rank = value.shape[0] if not is_b else value.shape[1] * groups_of(layer)
    for attribute in ("in_features", "in_channels") if is_b else ("out_features", "out_channels"):
        if hasattr(holder, attribute):
            setattr(holder, attribute, rank)
