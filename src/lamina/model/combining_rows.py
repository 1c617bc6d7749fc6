"""Combine the rows that adapters replace (`trainable_token_indices`): exactly, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.layers import TrainableTokensLayer
from lamina.engine.names import places


def token_layers(model: nn.Module) -> dict[str, TrainableTokensLayer]:
    """Plain name -> the layer that replaces rows there, without those that use another's."""
    found = {}
    for place in places(model):
        inner = getattr(place.module, "token_adapter", place.module)
        if isinstance(inner, TrainableTokensLayer) and inner.tied_adapter is None:
            found[place.name] = inner
    return found


def union_of_rows(model: nn.Module, configs: Mapping[str, LoraConfig]) -> Any:
    """`trainable_token_indices` for all rows that any of these adapters replaces."""
    asked = [config.trainable_token_indices for config in configs.values()]
    if all(each == asked[0] for each in asked):
        return asked[0]
    return {
        name: sorted({i for adapter in configs for i in layer.token_indices.get(adapter, ())})
        for name, layer in token_layers(model).items()
        if any(adapter in layer.records for adapter in configs)
    }


@torch.no_grad()
def fill_rows(model: nn.Module, shares: Mapping[str, float], name: str) -> None:
    """`row + sum_i w_i * (row_i - row)` for each row, where `row` is the table's own."""
    for layer in token_layers(model).values():
        if name not in layer.records:
            continue
        own = layer.original_rows(name)
        total = own.double()
        here: Sequence[int] = layer.token_indices[name]
        for adapter, weight in shares.items():
            if adapter not in layer.records:
                continue
            theirs = layer.token_indices[adapter]
            place = torch.tensor([here.index(i) for i in theirs], device=total.device)
            change = layer.rows(adapter).double() - layer.original_rows(adapter).double()
            total = total.index_add(0, place, weight * change)
        layer.assign(name, "trainable_tokens_delta", total.to(layer.rows(name).dtype))
