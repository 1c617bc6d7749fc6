"""What an adapter makes of each tensor of its base, told by the engine's own layers.

The model is on the meta device, with the adapter in it. A weight is brought in, folded into by the
very code that folds in memory, and taken out again; so both ways give the same bits.
"""

from __future__ import annotations

import copy
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.engine.layers import LoraLayer, lora_layers
from lamina.engine.layers.embedding import Embedding
from lamina.engine.layers.linear import Linear
from lamina.engine.layers.parameter import ParamWrapper
from lamina.engine.layers.walk import saved_modules
from lamina.engine.names import places
from lamina.engine.ops.dispatch import rows_at_a_time
from lamina.engine.state import AdapterState
from lamina.engine.ties import shared_folds
from lamina.engine.variants import Dora, PlainLora
from lamina.engine.weights.dense import ON_META

# A whole weight at a time: it takes several times its own memory.
_ONE_BY_ONE = threading.Lock()


@dataclass(frozen=True)
class Replaced:
    """A tensor that the adapter brings along."""

    value: torch.Tensor

    def rows(self, shape: Sequence[int]) -> int | None:
        """It takes nothing from the base."""
        return None

    def of(self, value: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The tensor, whatever the base has."""
        return self.value.detach().to(dtype)


@dataclass(frozen=True)
class Folded:
    """A weight that layers add the adapter to.

    Attributes:
        adapter: its name.
        layers: those over the weight, in the order in which they fold.
        module: the module that holds the weight.
        leaf: the weight's name in it.
    """

    adapter: str
    layers: tuple[LoraLayer, ...]
    module: nn.Module
    leaf: str

    def rows(self, shape: Sequence[int]) -> int | None:
        """How many rows can be folded into at a time; None: all, or none."""
        here = self.module._parameters[self.leaf]
        same = here is not None and here.is_meta and tuple(here.shape) == tuple(shape)
        if not same or len(self.layers) != 1 or not _by_rows(self.layers[0], self.adapter):
            return None
        return 1 if len(shape) == 3 else rows_at_a_time(shape[1])

    @torch.no_grad()
    def part(self, value: torch.Tensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of the weight with the adapter added, rounded once."""
        layer = _narrow(self.layers[0], self.adapter, value, rows)
        return layer.folded([self.adapter])[0].to(dtype)

    @torch.no_grad()
    def of(self, value: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The weight with the adapter added, rounded once."""
        here = self.module._parameters[self.leaf]
        assert here is not None
        if value is None or not here.is_meta:
            # It was brought along, or in before.
            value = here.detach()
        step = self.rows(value.shape)
        if step is not None:
            made = torch.empty(value.shape, dtype=dtype)
            for i in range(0, value.shape[0], step):
                rows = slice(i, min(i + step, value.shape[0]))
                made[rows] = self.part(value[rows], rows, dtype)
            return made
        with _ONE_BY_ONE:
            return self._whole(_grown(value, here.shape), here, dtype)

    def _whole(self, value: torch.Tensor, before: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        # Where several fold, what is between them is kept as wide as it is in memory.
        value = value.to(torch.promote_types(value.dtype, dtype))
        self.module._parameters[self.leaf] = nn.Parameter(value, requires_grad=False)
        try:
            for layer in self.layers:
                layer.weight_view.swap(layer.folded([self.adapter])[0])
            now = self.module._parameters[self.leaf]
            assert now is not None
            return now.detach().to(dtype)
        finally:
            self.module._parameters[self.leaf] = before


@dataclass(frozen=True)
class Biased:
    """A bias that those of B are added to."""

    adapter: str
    layer: LoraLayer

    def rows(self, shape: Sequence[int]) -> int | None:
        """It is small."""
        return None

    @torch.no_grad()
    def of(self, value: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The bias with those of B added, rounded once."""
        total = self.layer.folded_bias([self.adapter])
        assert total is not None
        return total.to(dtype)


Change = Replaced | Folded | Biased


@dataclass(frozen=True)
class Value:
    """What a tensor of the model is in the end.

    Attributes:
        identity: equal for names that hold one tensor then.
        change: None if it is as the base has it.
    """

    identity: tuple[str, int]
    change: Change | None


@dataclass(frozen=True)
class Changes:
    """What becomes of a model.

    Attributes:
        values: name -> value, of all parameters and buffers.
        before: name -> what tells which names hold one tensor in the base.
        shapes: name -> shape.
        refused: why the adapter can't be folded; the engine would say the same.
        faults: what can't be done tensor by tensor.
        layers: how many layers the adapter is in.
    """

    values: dict[str, Value]
    before: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    refused: tuple[str, ...]
    faults: tuple[str, ...]
    layers: int


def changes_of(root: nn.Module, adapter: str, state: AdapterState, given: set[str]) -> Changes:
    """What an adapter that is active in a model on the meta device makes of it.

    Args:
        root: the adapted model, without a facade.
        adapter: the adapter's name.
        state: the model's shared state.
        given: names of tensors that aren't on meta: they may have been changed on loading.
    """
    tensors = dict(_tensors(root))
    before = {name: id(tensor) for name, tensor in tensors.items()}
    values = {name: Value(("base", id(tensor)), None) for name, tensor in tensors.items()}
    brought = {before[name] for name in given & tensors.keys()}
    for name, tensor in tensors.items():
        if id(tensor) in brought:
            values[name] = Value(("own", id(tensor)), Replaced(tensor))
    work = [(path, layer, [adapter]) for path, layer in lora_layers(root)]
    work = [entry for entry in work if adapter in entry[1].records]
    shared = shared_folds(places(root), work)
    refused = [
        f"{path}: {reason}"
        for path, layer, names in work
        if (reason := _why_not(layer, names, shared.refused))
    ]
    faults = [f"{path}: {reason}" for path, layer, _ in work if (reason := _unlike(layer, adapter))]
    for change in _folds([layer for _, layer, _ in work if id(layer) not in shared.sources]):
        held = change.module._parameters[change.leaf]
        for name, identity in before.items():
            if identity == id(held):
                values[name] = Value(("fold", identity), change)
    for _, layer, _ in work:
        bias = getattr(layer.get_base_layer(), "bias", None)
        if layer.records[adapter].lora_bias and isinstance(bias, torch.Tensor):
            for name, identity in before.items():
                if identity == id(bias):
                    values[name] = Value(("bias", identity), Biased(adapter, layer))
    values.update(_saved(root, adapter))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Changes(values, before, shapes, tuple(refused), tuple(faults), len(work))


def _tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every name of every parameter and saved buffer; ties have several."""
    for place in places(root):
        module = place.original
        prefix = f"{place.name}." if place.name else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + leaf, parameter
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield prefix + leaf, buffer


def _why_not(layer: LoraLayer, names: Sequence[str], tied: dict[int, str]) -> str | None:
    reason = tied.get(id(layer.get_base_layer())) or layer.why_not_foldable(names)
    return None if reason == ON_META else reason


def _unlike(layer: LoraLayer, adapter: str) -> str | None:
    """Why a layer can't be folded without the weights of its base; None if it can."""
    record = layer.records[adapter]
    if layer.displaced or record.variant.changes_base:
        return "its base was changed when the adapter began"
    if layer.weight_view.quantised:
        return "its weight is quantised"
    if any(tensor.is_meta for tensor in layer.stored(adapter).values()):
        return "the file doesn't have all of its values"
    return None


def _folds(layers: Sequence[LoraLayer]) -> Iterator[Folded]:
    held: dict[tuple[int, str], list[LoraLayer]] = defaultdict(list)
    modules: dict[int, nn.Module] = {}
    for layer in layers:
        view: Any = layer.weight_view
        module, leaf = view.layer, getattr(view, "name", "weight")
        modules[id(module)] = module
        held[id(module), leaf].append(layer)
    for (module_id, leaf), here in held.items():
        adapter = next(iter(here[0].records))
        yield Folded(adapter, tuple(here), modules[module_id], leaf)


def _saved(root: nn.Module, adapter: str) -> Iterator[tuple[str, Value]]:
    wrappers = {id(wrapper) for _, wrapper in saved_modules(root)}
    for place in places(root):
        wrapper: Any = place.module
        if id(wrapper) in wrappers and adapter in wrapper.modules_to_save:
            for leaf, tensor in wrapper.tensors(adapter).items():
                yield f"{place.name}.{leaf}", Value(("own", id(tensor)), Replaced(tensor))


def _by_rows(layer: LoraLayer, adapter: str) -> bool:
    variant = layer.records[adapter].variant
    if type(layer) is ParamWrapper:
        return type(variant) is PlainLora and layer.get_param().dim() == 3
    if type(layer) is Linear:
        # A norm of DoRA is that of a row; where rows are stored as columns, it needs them all.
        of_rows = type(variant) is Dora and not layer.fan_in_fan_out
        return type(variant) is PlainLora or of_rows
    return type(layer) is Embedding and type(variant) is PlainLora


def _narrow(layer: LoraLayer, adapter: str, value: torch.Tensor, rows: slice) -> LoraLayer:
    """A layer of a few rows of the weight: what it folds are these rows."""
    module = layer.get_base_layer()
    alike = copy.copy(module)
    leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    alike._parameters = {**module._parameters, leaf: nn.Parameter(value, requires_grad=False)}
    record = layer.records[adapter]
    made = (
        ParamWrapper(alike, layer.adapter_state, leaf)
        if isinstance(layer, ParamWrapper)
        else type(layer)(alike, layer.adapter_state)
    )
    made.records = {adapter: record}
    made.add_factors(adapter, record, layer.factors(adapter)[0].dtype)
    a, b = (factor.detach() for factor in layer.factors(adapter))
    for place, factor in zip(layer.factor_names, _cut(layer, adapter, a, b, rows), strict=True):
        made.assign(adapter, place if layer.is_embedding else f"{place}.weight", factor)
    if isinstance(record.variant, Dora):
        magnitude = layer.tensors(adapter)["lora_magnitude_vector"].detach()
        record.variant.prepare(made, adapter, magnitude.dtype)
        made.assign(adapter, "lora_magnitude_vector", magnitude[rows])
    return made


def _cut(
    layer: LoraLayer, adapter: str, a: torch.Tensor, b: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of these rows of the weight, as it is stored."""
    if isinstance(layer, ParamWrapper):
        ranks = a.shape[0] // layer.num_experts
        by_expert = b.unflatten(1, (ranks, layer.num_experts))[..., rows].flatten(1)
        return a[rows.start * ranks : rows.stop * ranks], by_expert
    if layer.is_embedding or getattr(layer, "fan_in_fan_out", False):
        return a[:, rows], b
    return a, b[rows]


def _grown(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A table with room for new tokens, whose rows the adapter has."""
    if value.shape == shape:
        return value
    grown = value.new_zeros(shape)
    grown[: value.shape[0]] = value
    return grown
