"""Names of an adapter's tensors: in the model <-> on disk, one to one.

On disk a name is `<prefix><plain module name>.<leaf>`, for instance
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`: the adapter's name and whatever
torch wraps around modules (compile, FSDP, data parallel) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lamina.checkpoint.origin import PREFIX, WRAPPERS
from lamina.engine.layers import (
    LoraLayer,
    ModulesToSaveWrapper,
    SvdLayer,
    TrainableTokensLayer,
    TrainableTokensWrapper,
)
from lamina.engine.layers.parameter import wrappers
from lamina.engine.layers.svd import RANKS_ALONG
from lamina.engine.names import Place, places
from lamina.engine.state import AdapterState
from lamina.engine.variants import disk_leaf, places_of_variants

_PLACES = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "trainable_tokens_delta",
)
_DOUBLE = re.compile(r"\.(?:modules_to_save|original_module)(\..+)$")


@dataclass(frozen=True)
class Slot:
    """Where one tensor of an adapter lives in a model.

    Attributes:
        module: plain name of the module that it belongs to.
        leaf: its name inside the module on disk, such as `lora_A.weight`.
        kind: "factor", "saved" (of a module trained whole) or "bias" (of the base).
        tensor: what is there now; on the meta device if it is still to be filled.
        put: makes a tensor of the right shape the new value.
        ranks_along: the dimension that may have another size, since an adapter's ranks lie along
            it and are shared out among layers.
    """

    module: str
    leaf: str
    kind: str
    tensor: torch.Tensor
    put: Callable[[torch.Tensor], None]
    ranks_along: int | None = None

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape can be put there."""
        here = list(self.tensor.shape)
        if self.ranks_along is not None and len(shape) == len(here):
            here[self.ranks_along] = shape[self.ranks_along]
        return list(shape) == here


def slots(
    model: nn.Module, adapter: str, state: AdapterState, *, alone: bool = False
) -> dict[str, Slot]:
    """Name on disk -> slot, for every tensor of an adapter.

    Args:
        model: the adapted model; of a `PeftModel` the names begin with `base_model.model.`.
        adapter: the adapter's whole name.
        state: the model's shared state.
        alone: spell the names as if there were no other adapter: that is how they are in a file
            that holds this one only.
    """
    found: dict[str, Slot] = {}
    seen: set[int] = set()
    bias_names: dict[str, str] = {}
    for place, name in disk_names(model):
        layer = place.module
        bias_names[place.name] = _join(name, "bias")
        if isinstance(layer, LoraLayer) and (adapter in layer.records or not alone):
            bias_names[place.name] = _join(name, "base_layer.bias")
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        for slot in _slots_of(layer, name, adapter):
            found[_join(slot.module, slot.leaf)] = slot
    found.update(_bias_slots(state, adapter, bias_names))
    return found


def disk_names(model: nn.Module) -> Iterator[tuple[Place, str]]:
    """Every place of a model with its name on disk."""
    names: dict[str, str] = {}
    for place in places(model):
        outer, _, child = place.name.rpartition(".")
        # An adapted attention's output projection is adapted inside of it.
        adapted = isinstance(place.module, LoraLayer)
        inside = (
            "base_layer." if adapted and isinstance(place.parent, nn.MultiheadAttention) else ""
        )
        names[place.name] = _join(names.get(outer, outer), inside + child)
        yield place, names[place.name]


def _slots_of(layer: nn.Module, name: str, adapter: str) -> Iterable[Slot]:
    for inside, part in parts(layer, name, adapter):
        for leaf, parameter in part.stored(adapter).items():
            along = RANKS_ALONG.get(leaf) if isinstance(part, SvdLayer) else None
            put = _factor_setter(part, adapter, leaf)
            yield Slot(inside, leaf, "factor", parameter, put, along)
    if isinstance(layer, ModulesToSaveWrapper) and adapter in layer.modules_to_save:
        for leaf, tensor in layer.tensors(adapter).items():
            yield Slot(name, leaf, "saved", tensor, _saved_setter(layer, adapter, leaf))


def parts(module: nn.Module, name: str, adapter: str) -> Iterable[tuple[str, LoraLayer]]:
    """(name on disk, layer) of all that holds factors of an adapter at one place.

    Of the wrappers of several parameters, only those count that the adapter is in: a file of it
    alone has no others.
    """
    if isinstance(module, TrainableTokensWrapper):
        return _parts_of_table(module.token_adapter, f"{name}.token_adapter", adapter)
    if isinstance(module, TrainableTokensLayer):
        return _parts_of_table(module, name, adapter)
    chain: list[nn.Module] = [*wrappers(module)] or [module]
    here = [part for part in chain if isinstance(part, LoraLayer) and adapter in part.records]
    return [(name + ".base_layer" * depth, part) for depth, part in enumerate(here)]


def _parts_of_table(
    table: TrainableTokensLayer, name: str, adapter: str
) -> list[tuple[str, LoraLayer]]:
    """Rows, unless they are another table's, and low-rank updates inside."""
    inner = table.base_layer
    found: list[tuple[str, LoraLayer]] = []
    if adapter in table.records and table.tied_adapter is None:
        found.append((name, table))
    if isinstance(inner, LoraLayer) and adapter in inner.records:
        found.append((f"{name}.base_layer", inner))
    return found


def _factor_setter(layer: LoraLayer, adapter: str, leaf: str) -> Callable[[torch.Tensor], None]:
    def put(value: torch.Tensor) -> None:
        current = layer.stored(adapter)[leaf]
        if current.is_meta or current.shape != value.shape:
            device = layer.weight_view.device
            # The base may have its weights elsewhere for now; these would be lost on meta.
            where = value.device if device.type == "meta" else device
            layer.assign(adapter, leaf, value.to(device=where, dtype=current.dtype))
        else:
            current.data.copy_(value)

    return put


def _saved_setter(
    wrapper: ModulesToSaveWrapper, adapter: str, leaf: str
) -> Callable[[torch.Tensor], None]:
    def put(value: torch.Tensor) -> None:
        current = wrapper.tensors(adapter)[leaf]
        if current.is_meta:
            wrapper.assign(adapter, leaf, value.to(current.dtype))
        else:
            current.data.copy_(value)

    return put


def _copier(tensor: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def put(value: torch.Tensor) -> None:
        tensor.data.copy_(value)

    return put


def _bias_slots(state: AdapterState, adapter: str, keys: dict[str, str]) -> dict[str, Slot]:
    found = {}
    for name, value in state.biases.of(adapter).items():
        # State knows names inside the base model, keys those inside the model that was given.
        module = name.rpartition(".")[0]
        match = next((key for key in (module, PREFIX + module) if key in keys), module)
        key = keys.get(match, _join(match, "bias"))
        found[key] = Slot(match, key.removeprefix(f"{match}."), "bias", value, _copier(value))
    return found


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def is_double(key: str, keys: Collection[str]) -> bool:
    """Whether PEFT wrote a part of a module trained whole once more, beside its own name.

    It does so with biases for `bias="all"`, and with embeddings and heads where the vocabulary was
    resized. The base has the original.
    """
    plain = _DOUBLE.sub(r"\1", key)
    return plain != key and plain in keys


def respelt_bias(key: str, wanted: Collection[str]) -> str:
    """A bias is `x.base_layer.bias` if an adapter is in x, else `x.bias`: the one in `wanted`."""
    if key in wanted or not key.endswith(".bias"):
        return key
    plain = key.replace(".base_layer.bias", ".bias")
    inner = f"{plain.removesuffix('.bias')}.base_layer.bias"
    return next((name for name in (plain, inner) if name in wanted), key)


def disk_key(key: str, adapter: str) -> str | None:
    """The name on disk of an entry of a model's `state_dict`; None if it isn't of this adapter."""
    key = WRAPPERS.sub("", key)
    parts = key.split(".")
    inside_layers = {*_PLACES, *places_of_variants()}
    for index, part in enumerate(parts[:-1]):
        if parts[index + 1] != adapter:
            continue
        if part in inside_layers:
            leaf = disk_leaf(".".join([part, *parts[index + 2 :]]))
            return ".".join([*parts[:index], leaf])
        if part == "modules_to_save":
            return ".".join([*parts[:index], *parts[index + 2 :]])
    return key if parts[-1] == "bias" else None


def taken(
    wanted: Collection[str], adapter: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The entries of a model's `state_dict` that `wanted` names on disk, in its order.

    The state dict may be of the model inside a `PeftModel`, and its names may have wrappers' parts.
    """
    found = {}
    for key, tensor in state_dict.items():
        name = disk_key(key, adapter)
        for candidate in () if name is None else (name, PREFIX + name):
            found[respelt_bias(candidate, wanted)] = tensor
    return {key: found[key] for key in wanted if key in found}


def map_keys(keys: Iterable[str], mapping: dict[str, str]) -> dict[str, str]:
    """Every key -> itself after the first regular expression of `mapping` that changes it."""
    patterns = [(re.compile(pattern), to) for pattern, to in mapping.items()]
    renamed = {}
    for key in keys:
        changed = (pattern.sub(to, key) for pattern, to in patterns if pattern.search(key))
        renamed[key] = next(changed, key)
    return renamed


def suggest_mapping(file_keys: Iterable[str], model_keys: Iterable[str]) -> dict[str, str]:
    """The prefixes that would have to be exchanged for a file's names to become a model's.

    Returns:
        {} if no exchange of prefixes makes a file's name one of the model's; else a mapping for
        `key_mapping`, from a regular expression to its replacement.
    """
    wanted = set(model_keys)
    by_suffix: dict[str, str] = {}
    for key in wanted:
        parts = key.split(".")
        for start in range(len(parts)):
            by_suffix.setdefault(".".join(parts[start:]), ".".join(parts[:start]))
    found: dict[str, str] = {}
    votes: dict[tuple[str, str], int] = {}
    for key in file_keys:
        if key in wanted:
            continue
        parts = key.split(".")
        for start in range(len(parts)):
            suffix = ".".join(parts[start:])
            if suffix in by_suffix and _specific(suffix):
                pair = (".".join(parts[:start]), by_suffix[suffix])
                votes[pair] = votes.get(pair, 0) + 1
                break
    for (old, new), _ in sorted(votes.items(), key=lambda item: -item[1])[:4]:
        found.setdefault(rf"^{re.escape(old)}\." if old else "^", f"{new}." if new else "")
    return found


def _specific(suffix: str) -> bool:
    # `lora_A.weight` alone would fit everywhere.
    head = suffix.split(".", maxsplit=1)[0]
    return not head.startswith("lora_") and head not in ("weight", "bias", "base_layer")
