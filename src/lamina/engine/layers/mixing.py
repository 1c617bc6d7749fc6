"""A layer in a batch whose rows go to different adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lamina.engine.routing import BASE, Routing
from lamina.errors import RoutingError

if TYPE_CHECKING:
    from lamina.engine.layers.base import LoraLayer

# What a layer may be called with beside what its base takes.
ASIDE = frozenset({"adapter_names", "alora_offsets"})
# Modules that take each row of their first input for itself.
_BY_ROW = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def routing_of(layer: LoraLayer, kwargs: dict[str, Any]) -> Routing | None:
    """Take what is said of rows out of a layer's arguments; without it, the model's routing."""
    names, offsets = kwargs.pop("adapter_names", None), kwargs.pop("alora_offsets", None)
    if names is None and offsets is None:
        return layer.adapter_state.routing
    return Routing(
        names=None if names is None else tuple(names),
        offsets={} if offsets is None else {name: list(offsets) for name in layer.records},
    )


def add_by_rows(
    layer: LoraLayer, x: torch.Tensor, result: torch.Tensor, routing: Routing
) -> torch.Tensor:
    """`result` with each row's adapter added in its rows.

    Raises:
        RoutingError: the batch has another number of rows, or adapters are folded in.
    """
    batch = x.shape[0]
    routing.repeats(batch)
    refuse_folded(layer.merged_adapters)
    result = _given_back(layer, x, result, routing)
    for name in routing.adapters:
        if name not in layer.records:
            continue
        variant = layer.records[name].variant
        if variant.routes_itself:
            result = variant.add(layer, name, x, result).to(result.dtype)
            continue
        rows = routing.rows(name, batch, x.device)
        part = variant.add(layer, name, x[rows], result[rows])
        result = result.index_copy(0, rows, part.to(result.dtype))
    return result


def _given_back(
    layer: LoraLayer, x: torch.Tensor, result: torch.Tensor, routing: Routing
) -> torch.Tensor:
    """`result` with what adapters took out of the base, in the rows that go elsewhere."""
    for holder, taken in layer.displaced.items():
        if taken.becomes is None and not layer.adapter_state.changes_stay:
            rows = routing.rows_without(holder, x.shape[0], x.device)
            result = result.index_add(0, rows, taken.output(x[rows]).to(result.dtype))
    return result


def by_rows(
    original: nn.Module,
    copies: nn.ModuleDict,
    routing: Routing,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """What each row's copy of a module gives; the original's answer where its adapter has none.

    Raises:
        RoutingError: the module isn't one that takes each row for itself.
    """
    if not isinstance(original, _BY_ROW) or not args:
        names = ", ".join(kind.__name__ for kind in _BY_ROW)
        raise RoutingError(
            f"Mixed batching is only supported for the following modules: {names}. A "
            f"{type(original).__name__} is trained whole here.",
            cure="leave it out of modules_to_save, or answer for one adapter at a time",
        )
    x, *others = args
    batch = x.shape[0]
    routing.repeats(batch)
    result: torch.Tensor | None = None
    for name in (BASE, *routing.adapters):
        module = copies[name] if name in copies else original  # noqa: SIM401 - it has no get
        rows = routing.rows(name, batch, x.device)
        if not len(rows):
            continue
        part = module(x[rows], *others, **kwargs)
        result = part.new_empty(batch, *part.shape[1:]) if result is None else result
        result = result.index_copy(0, rows, part.to(result.dtype))
    assert result is not None
    return result


def refuse_folded(merged: Sequence[str]) -> None:
    """Raise if adapters are folded in: all rows would have them."""
    if merged:
        raise RoutingError(
            "Cannot pass `adapter_names` when there are merged adapters, please call "
            "`unmerge_adapter` first.",
            faults=[f"{name!r} is folded into the base weights" for name in merged],
            cure="model.unmerge_adapter()",
        )


def refuse_rows(layer: LoraLayer, routing: Routing | None) -> None:
    """Raise if rows go to different adapters, in a layer that has one answer for all."""
    if routing is not None and not layer.records.keys().isdisjoint(routing.adapters):
        raise RoutingError(
            f"lora.{type(layer).__name__} does not support mixed adapter batches yet.",
            cure="leave adapter_names out, and answer for one adapter at a time",
        )
