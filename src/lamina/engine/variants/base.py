"""What a variant has to say: its part of the forward, and its part of a folded weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from lamina.engine.weights import BaseWeight


class Update(Protocol):
    """What a variant may ask of a layer."""

    # "linear", "embedding", "conv" ...
    kind: str
    # The layer that is adapted; a variant calls it, or asks for its shape.
    base_layer: Any
    # adapter -> `lamina.engine.layers.LayerAdapter`, with the config that it was made from.
    records: dict[str, Any]
    # The model's shared `lamina.engine.state.AdapterState`.
    adapter_state: Any
    training: bool
    # adapter -> what drops entries of its input.
    lora_dropout: nn.ModuleDict

    def dropped(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`x` as the adapter's A takes it: in its dtype, entries dropped while training."""

    def update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`scaling * B(A(x))`, shaped like the base's output; no dropout."""

    def low_rank(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`scaling * B(A(dropout(x)))`, shaped like the base's output."""

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A`, shaped like the base's weight, summed in at least fp32."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r x in) and B (out x r)."""

    def place(self, name: str) -> nn.ModuleDict:
        """Where the layer's adapters keep modules of that name, such as `lora_magnitude_vector`."""

    @property
    def weight_view(self) -> BaseWeight:
        """The base's weight; what it is made of is none of a variant's business."""

    def unfolded_weight(self) -> torch.Tensor:
        """The base's dense values without the adapters that are folded in; don't write."""

    def weight_for(self, adapter: str) -> torch.Tensor:
        """The base's dense values, with what others than `adapter` took out of it; don't write."""


class Variant:
    """One method. It has no state of its own, so that one object serves all layers.

    Attributes:
        is_plain: whether this is LoRA without anything added.
        is_sum: whether its update is `scaling * B @ A` whatever the base is, so that updates can
            be concatenated exactly.
        places: names of the places, beside A and B, where it keeps parameters (modules by adapter).
        spelling: name of a parameter inside the layer, without the adapter's -> its name on disk,
            where they differ.
        buffers: names of the places where it keeps tensors that don't train (by adapter).
        changes_base: whether `begin` changes the base's weight, so that it has to be called before
            an adapter is loaded too.
        frozen: names on disk of parameters that never train.
        kinds: the kinds of layers that it is made for.
        routes_itself: whether `add` leaves rows alone that go elsewhere, by the shared state's
            routing; else it is given its own rows only.
    """

    is_plain: bool = False
    is_sum: bool = False
    places: Sequence[str] = ()
    spelling: Mapping[str, str] = {}
    buffers: Sequence[str] = ()
    changes_base: bool = False
    frozen: Sequence[str] = ()
    kinds: Sequence[str] = ("linear",)
    routes_itself: bool = False

    def why_not(self, kind: str, base: nn.Module, config: Any, target: str) -> str | None:
        """None if a layer can be adapted by this method, else the reason; asked before all else.

        Args:
            kind: what adapts the layer: "linear", "embedding", "conv" ...
            base: the layer.
            config: the adapter's config.
            target: the layer's plain name.
        """
        if kind in self.kinds:
            return None
        return f"{type(self).__name__} is made for {' and '.join(self.kinds)} layers"

    def scaling(self, r: int, lora_alpha: float, use_rslora: bool) -> float:
        """What an update of this rank is multiplied by: `lora_alpha / r`, by rsLoRA its root."""
        return lora_alpha / (math.sqrt(r) if use_rslora else r)

    def prepare(self, layer: Update, adapter: str, dtype: torch.dtype) -> None:
        """Put parameters of its own, on the meta device, into the layer's places."""

    def begin(self, layer: Update, adapter: str) -> None:
        """Give its own parameters their first values; A and B have theirs."""

    def end(self, layer: Update, adapter: str) -> None:
        """Forget what was kept of an adapter beside its places; it is being deleted."""

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """`result`, the output so far, with the adapter's part for the input `x` added."""
        raise NotImplementedError

    def delta(self, layer: Update, adapter: str) -> torch.Tensor:
        """The dense update, shaped like the base's weight, summed in at least fp32."""
        return layer.delta_weight(adapter)

    def fold(self, layer: Update, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` (in the accumulation dtype; may be written into) with the update added."""
        return weight.add_(self.delta(layer, adapter))

    def why_not_foldable(self, layer: Update, adapter: str) -> str | None:
        """None if the update can be folded into a weight, else the reason."""
        return None
