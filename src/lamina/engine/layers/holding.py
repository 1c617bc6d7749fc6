"""The adapters of a layer: their records, and the parameters that belong to them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from torch import nn

from lamina.engine.buffers import BufferDict
from lamina.engine.dtypes import adapter_dtype, exact
from lamina.engine.init import as_made, initialisation
from lamina.engine.layers.record import LayerAdapter
from lamina.engine.layers.switching import Switched
from lamina.engine.ops.straight_through import straight_through
from lamina.engine.state import AdapterState
from lamina.engine.weights import BaseWeight, weight_of
from lamina.errors import FoldError

# What a layer's adapters keep things in, by their names.
_PLACES = (nn.ModuleDict, nn.ParameterDict, BufferDict)


class AdapterHolder(Switched):
    """A base layer with adapters.

    Args:
        base_layer: the layer that is adapted; it stays as it is.
        state: the model's shared state.
    """

    # Any: torch types the attributes of a module as Tensor | Module.
    base_layer: Any
    lora_dropout: nn.ModuleDict
    # The places where factors lie; their order is A, B.
    factor_names: tuple[str, ...] = ("lora_A", "lora_B")
    # What variants and initialisations tell layers apart by.
    kind: str = "linear"

    @property
    def is_embedding(self) -> bool:
        """Whether its input are rows to look up."""
        return self.kind == "embedding"

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__(state)
        self.base_layer = base_layer
        weight = self.weight_view
        # Asked in every forward, so a dense base is told apart once.
        self._doubtful: Any = (
            weight if weight.may_stop_gradients and self.kind == "linear" else None
        )
        self.records: dict[str, LayerAdapter] = {}
        self.merged_adapters: list[str] = []
        self.lora_dropout = nn.ModuleDict()
        self.train(base_layer.training)

    # --- what a kind of layer says -----------------------------------------------------------

    @abstractmethod
    def add_factors(self, name: str, record: LayerAdapter, dtype: torch.dtype) -> None:
        """Put factors on the meta device into the places of `factor_names`."""

    @abstractmethod
    def update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`scaling * B(A(x))`, shaped like the base's output; no dropout."""

    @abstractmethod
    def delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A`, shaped like the base's weight, summed in at least fp32."""

    @abstractmethod
    def unfolded_weight(self) -> torch.Tensor:
        """The base's dense values without the adapters that are folded in; don't write."""

    @abstractmethod
    def weight_for(self, adapter: str) -> torch.Tensor:
        """The base's dense values, with what others than `adapter` took out of it; don't write."""

    @abstractmethod
    def displace(self, adapter: str, becomes: torch.Tensor | None = None) -> None:
        """Take an adapter's update out of the base's weight, or set the weight to `becomes`."""

    def dropped(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`x` as the adapter's A takes it: in its dtype, entries dropped while training."""
        raise NotImplementedError

    def low_rank(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`scaling * B(A(dropout(x)))`, shaped like the base's output."""
        return self.update(adapter, self.dropped(adapter, x))

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output; gradients reach `x` even where the base's own forward stops them."""
        doubtful = self._doubtful
        trains = doubtful is not None and x.requires_grad and torch.is_grad_enabled()
        if trains and doubtful.stops_gradients and doubtful.layer is self.base_layer:
            return straight_through(x, self.base_layer, doubtful)
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return result

    # --- adapters ----------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        record: LayerAdapter,
        *,
        init: bool | str | None = True,
        upcast: bool = True,
    ) -> None:
        """Add an adapter.

        Args:
            name: its name.
            record: its numbers in this layer.
            init: how the factors begin; None leaves them on the meta device, to be assigned.
            upcast: keep half-precision adapters in fp32; see `lamina.engine.dtypes`.
        """
        weight = self.weight_view
        dtype = adapter_dtype(weight.dtype, upcast=upcast)
        self.records[name] = record
        self.lora_dropout[name] = nn.Dropout(record.p) if record.p > 0 else nn.Identity()
        self.lora_dropout[name].train(self.training)
        self.add_factors(name, record, dtype)
        record.variant.prepare(self, name, dtype)
        for leaf, parameter in self.tensors(name).items() if record.variant.frozen else ():
            if leaf in record.variant.frozen:
                parameter.requires_grad_(False)
        if init is not None:
            self.initialise(name, init)

    @torch.no_grad()
    def initialise(self, name: str, init: bool | str) -> None:
        """Begin an adapter's weights anew, on the base's device; nothing to do on meta."""
        device = self.weight_view.device
        if device.type == "meta":
            return
        for leaf, buffer in self.buffers_of(name).items():
            self.assign(name, leaf, torch.zeros_like(buffer, device=device))
        for leaf, parameter in self.tensors(name).items():
            make = torch.zeros_like if leaf.endswith("bias") else torch.empty_like
            self.assign(name, leaf, make(parameter, device=device))
        with exact(device):
            as_made(self, name)
            initialisation(init).begin(self, name)
        self.records[name].variant.begin(self, name)

    def leave_to_be_filled(self, name: str) -> None:
        """Put an adapter's weights on the meta device: they are about to be loaded."""
        for leaf, parameter in self.tensors(name).items():
            self.assign(name, leaf, parameter.detach().to("meta"))

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter's weights; it must not be folded in."""
        if name in self.merged_adapters:
            raise FoldError(
                f"The adapter {name!r} is folded into the base weights.",
                cure="model.unmerge_adapter() first",
            )
        self.records.pop(name).variant.end(self, name)
        for key, place in self._modules.items():
            holds = isinstance(place, _PLACES) and name in place
            if holds and key != "base_layer":
                del place[name]  # type: ignore[union-attr, operator]

    def place(self, name: str) -> nn.ModuleDict:
        """Where the layer's adapters keep modules of that name; made if it isn't there."""
        if name not in self._modules:
            setattr(self, name, nn.ModuleDict())
        place = self._modules[name]
        assert isinstance(place, nn.ModuleDict)
        return place

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of an adapter."""
        a, b = (self._parameter(place, name) for place in self.factor_names)
        return a, b

    def _parameter(self, place: str, name: str) -> nn.Parameter:
        held: Any = getattr(self, place)[name]
        parameter: Any = held if isinstance(held, torch.Tensor) else held.weight
        return cast(nn.Parameter, parameter)

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by their names on disk, e.g. `lora_A.weight`."""
        variant = self.records[name].variant
        found = {}
        for place in (*self.factor_names, *variant.places):
            held = getattr(self, place)[name]
            if isinstance(held, nn.Parameter):
                found[place] = held
                continue
            for attribute, parameter in held.named_parameters():
                leaf = f"{place}.{attribute}"
                found[variant.spelling.get(leaf, leaf)] = parameter
        return found

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """All that a file holds of an adapter here, by the names on disk."""
        return {**self.tensors(name), **self.buffers_of(name)}

    def buffers_of(self, name: str) -> dict[str, torch.Tensor]:
        """What an adapter has beside parameters, by the names on disk."""
        variant = self.records[name].variant
        found = {place: getattr(self, place)[name] for place in variant.buffers}
        for place in variant.places:
            held = getattr(self, place)[name]
            if isinstance(held, nn.Module):
                found |= {f"{place}.{path}": buffer for path, buffer in held.named_buffers()}
        return found

    def assign(self, name: str, leaf: str, value: torch.Tensor) -> None:
        """Make `value` the parameter, or buffer, that is `leaf` on disk; no copy is made."""
        variant = self.records[name].variant
        spelt = {disk: inner for inner, disk in variant.spelling.items()}
        place, _, path = spelt.get(leaf, leaf).partition(".")
        held = getattr(self, place)[name]
        if place in variant.buffers:
            getattr(self, place)[name] = value
            return
        if not path:
            grad = held.requires_grad
            getattr(self, place)[name] = nn.Parameter(value, requires_grad=grad)
            return
        owner_path, _, attribute = path.rpartition(".")
        owner = held.get_submodule(owner_path)
        if attribute in owner._buffers:
            owner._buffers[attribute] = value
            return
        grad = getattr(owner, attribute).requires_grad
        setattr(owner, attribute, nn.Parameter(value, requires_grad=grad))

    def own_adapters(self) -> Collection[str]:
        return self.records.keys()

    def trained_parameters(self, name: str) -> Iterator[nn.Parameter]:
        frozen = self.records[name].variant.frozen
        for leaf, parameter in self.tensors(name).items():
            # A view of another layer's factor is that layer's to train.
            if leaf not in frozen and isinstance(parameter, nn.Parameter):
                yield parameter

    @property
    def weight_view(self) -> BaseWeight:
        """The base layer's weight, to be read and written."""
        return weight_of(self.base_layer)
