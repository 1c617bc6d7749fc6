"""Adapters of modules that share one weight, sharing their factors too (`ensure_weight_tying`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.engine.layers.base import LayerAdapter, LoraLayer
from lamina.engine.layers.embedding import Embedding
from lamina.engine.layers.linear import Linear


class Transposed(nn.Module):
    """A factor that is another layer's factor transposed: one tensor, seen from both sides.

    Args:
        held: the places of the other layer's factors.
        adapter: the adapter's name in them.
    """

    bias = None
    _held: Any
    _adapter: str

    def __init__(self, held: nn.ParameterDict, adapter: str) -> None:
        super().__init__()
        self.__dict__.update(_held=held, _adapter=adapter)

    @property
    def weight(self) -> torch.Tensor:
        """The factor as this layer takes it."""
        other: torch.Tensor = self._held[self._adapter]
        return other.T

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """What is saved under this layer's name; the model counts the other layer's."""
        yield "weight", self.weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._held[self._adapter] = nn.Parameter(value.T, requires_grad=value.requires_grad)
        else:
            super().__setattr__(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def tie(layer: LoraLayer, name: str, record: LayerAdapter, source: LoraLayer) -> None:
    """Add an adapter whose update is that of `source`, a layer over the same table.

    Args:
        layer: an embedding, or a linear layer (the head).
        name: the adapter's name.
        record: its numbers, those of the source.
        source: an embedding that has the adapter already.
    """
    layer.records[name] = record
    layer.lora_dropout[name] = nn.Dropout(record.p) if record.p > 0 else nn.Identity()
    layer.lora_dropout[name].train(layer.training)
    layer.tied[name] = source
    assert isinstance(source, Embedding)
    if isinstance(layer, Linear):
        layer.lora_A[name] = Transposed(source.lora_embedding_B, name)
        layer.lora_B[name] = Transposed(source.lora_embedding_A, name)
        return
    assert isinstance(layer, Embedding)
    layer.lora_embedding_A[name] = source.lora_embedding_A[name]
    layer.lora_embedding_B[name] = source.lora_embedding_B[name]
