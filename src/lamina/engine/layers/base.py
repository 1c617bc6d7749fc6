"""An adapted layer: the base layer and the factors of its adapters.

forward, fold and unfold are written once, here and in `folding`. A kind of layer says how its
update is shaped, a variant how it is combined, a weight how it is read and written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.engine.layers.mixing import ASIDE, add_by_rows, routing_of
from lamina.engine.layers.outward import PeftNames
from lamina.engine.layers.record import LayerAdapter, RecordView
from lamina.engine.state import AdapterState

__all__ = ["LayerAdapter", "LoraLayer", "RecordView"]


class LoraLayer(PeftNames):
    """The base of all adapted layers.

    Args:
        base_layer: the layer that is adapted; it stays as it is.
        state: the model's shared state.
    """

    @classmethod
    def why_not(cls, base_layer: nn.Module) -> str | None:
        """None if this kind can adapt a module that it is registered for, else the reason."""
        return None

    @classmethod
    def made_for(
        cls, base_layer: nn.Module, state: AdapterState, name: str, record: LayerAdapter
    ) -> LoraLayer:
        """A layer around a module of a model, for an adapter that is about to be added to it."""
        return cls(base_layer, state)

    @property
    def tied(self) -> dict[str, LoraLayer]:
        """adapter -> the layer over the same weight whose factors it takes as its own."""
        # Not a child: the layers lie side by side in the model.
        tied: dict[str, LoraLayer] = self.__dict__.setdefault("_tied", {})
        return tied

    def source_of(self, name: str) -> LoraLayer | None:
        """The layer whose update is this one's too; None if it is its own."""
        return self.tied.get(name)

    def contributing(self) -> list[str]:
        """The adapters that the forward has to add: active, here, and not folded in."""
        merged = self.merged_adapters
        return [
            name
            for name in self.contributing_names()
            if name in self.records and name not in merged
        ]

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.records)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output plus what each contributing adapter adds, in the base's dtype.

        Args:
            x: the base's input.
            *args: what else the base takes.
            **kwargs: likewise; and for this layer alone `adapter_names`, an adapter for each row
                of `x`, and `alora_offsets`. See `lamina.engine.routing`.
        """
        if not ASIDE.isdisjoint(kwargs):
            with self.adapter_state.routed(routing_of(self, kwargs)):
                return self.added(x, *args, **kwargs)
        return self.added(x, *args, **kwargs)

    def added(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`forward`, for the rows as the shared state sends them."""
        result = self.base_output(x, *args, **kwargs)
        dtype = result.dtype
        routing = self.adapter_state.routing
        if routing is not None and routing.names is not None and not self.disable_adapters:
            return add_by_rows(self, x, result, routing)
        # First: a variant may rest on what the base gives.
        for displaced in self.lacking() if self.displaced else ():
            result = result + displaced.output(x)
        for name in self.contributing():
            result = self.records[name].variant.add(self, name, x, result)
        return result.to(dtype)
