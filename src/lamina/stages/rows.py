"""Rows of tables in a chain (`trainable_token_indices`): each row belongs to one stage.

A row is replaced, not added to, so a stage that trains a row of an older one takes it over. The
file has all rows of a table together, in the order of their indices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from lamina.checkpoint.origin import PREFIX, ROWS
from lamina.config import LoraConfig, PeftConfig
from lamina.engine.layers import LoraLayer, TrainableTokensLayer, TrainableTokensWrapper
from lamina.engine.names import places
from lamina.engine.targets import make_plan

# Plain name of a table -> indices of rows.
Rows = Mapping[str, Collection[int]]


def tables(model: nn.Module) -> dict[str, TrainableTokensLayer]:
    """Plain name -> every table of an adapted model that has rows of its own."""
    found = {}
    for place in places(model):
        if isinstance(place.module, TrainableTokensWrapper):
            layer = place.module.token_adapter
            if layer.tied_adapter is None:
                found[place.name] = layer
    return found


def tables_with_ranks(model: nn.Module) -> list[str]:
    """The tables that have rows replaced and a low-rank update too."""
    return [
        name for name, table in tables(model).items() if isinstance(table.base_layer, LoraLayer)
    ]


def rows_asked(model: nn.Module, config: PeftConfig | None) -> dict[str, tuple[int, ...]]:
    """The rows that a config would replace in a model."""
    if not isinstance(config, LoraConfig) or not config.trainable_token_indices:
        return {}
    plan = make_plan(model, config, strict=False)
    return {each.name: each.indices for each in plan.tokens if each.tied_to is None}


def rows_of(owners: Mapping[str, Mapping[str, Sequence[int]]], stage: str) -> dict[str, list[int]]:
    """The rows that a stage owns by the record."""
    return {table: list(stages[stage]) for table, stages in owners.items() if stages.get(stage)}


def without(rows: Mapping[str, Sequence[int]], taken: Rows) -> dict[str, list[int]]:
    """What is left of rows when others have been taken over."""
    left = {
        table: [row for row in own if row not in taken.get(table, ())]
        for table, own in rows.items()
    }
    return {table: own for table, own in left.items() if own}


def gather(
    model: nn.Module, adapters: Sequence[str]
) -> tuple[dict[str, dict[str, tuple[int, ...]]], dict[str, list[int]], dict[str, torch.Tensor]]:
    """All rows of a model's adapters, as they go into one file.

    Returns:
        table -> adapter -> its rows; table -> all rows, in the file's order; key -> tensor.
    """
    owners: dict[str, dict[str, tuple[int, ...]]] = {}
    together: dict[str, list[int]] = {}
    tensors = {}
    for name, table in tables(model).items():
        rows: dict[int, torch.Tensor] = {}
        for adapter in adapters:
            own = table.token_indices.get(adapter) if adapter in table.records else None
            if own:
                owners.setdefault(name, {})[adapter] = tuple(sorted(own))
                rows.update(zip(own, table.rows(adapter).detach(), strict=True))
        if rows:
            together[name] = sorted(rows)
            tensors[f"{PREFIX}{name}.{ROWS}"] = torch.stack([rows[i] for i in together[name]])
    return owners, together, tensors


def fill_rows(
    model: nn.Module,
    adapter: str,
    indices: Mapping[str, Sequence[int]],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What of a file's rows belongs into an adapter of a model, by names on disk.

    Args:
        model: the adapted model.
        adapter: the adapter.
        indices: table -> the rows that the file has, in its order.
        tensors: key -> tensor of the file.
    """
    found = {}
    for name, table in tables(model).items():
        key = f"{PREFIX}{name}.{ROWS}"
        if adapter in table.records and key in tensors:
            place = {row: i for i, row in enumerate(indices[name])}
            own = [place[row] for row in table.token_indices[adapter] if row in place]
            found[key] = tensors[key][own]
    return found


@torch.no_grad()
def take_over(
    model: nn.Module,
    adapter: str,
    indices: Mapping[str, Sequence[int]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Let the rows of a new adapter begin as those that the chain has replaced already."""
    for name, table in tables(model).items():
        key = f"{PREFIX}{name}.{ROWS}"
        if adapter not in table.records or key not in tensors:
            continue
        place = {row: i for i, row in enumerate(indices[name])}
        for i, row in enumerate(table.token_indices[adapter]):
            if row in place:
                own = table.rows(adapter)
                own[i].copy_(tensors[key][place[row]].to(own))
