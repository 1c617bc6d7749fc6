"""Swap an adapter's weights in place, so that a compiled model needs no new compilation.

What torch.compile has seen stays: the parameters are written into, scalings are tensors, and
ranks are padded with zeros to one that fits all adapters to come.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from lamina.checkpoint.adapter import read_adapter
from lamina.checkpoint.keys import Slot, disk_key, respelt_bias, slots
from lamina.checkpoint.origin import A_LEAVES, B_LEAVES, PREFIX, plain_key
from lamina.config import AdaLoraConfig, LoraConfig, PeftConfig, numbers
from lamina.engine.factored import factored_layers
from lamina.engine.inject import find_state
from lamina.engine.layers import LayerAdapter, LoraLayer
from lamina.engine.padding import groups_of, padded, set_factor
from lamina.engine.state import AdapterState
from lamina.engine.variants import variant_for
from lamina.errors import ConfigError, FoldError, KeyMismatchError
from lamina.model.loading import HUB_OPTIONS
from lamina.model.numbering import describe_numbers
from lamina.model.original import on_base_of
from lamina.storage.source import PathOrId

# What the tensors and scalings don't tell.
_COMPARED = (
    "lora_dropout",
    "use_dora",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: PathOrId,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put the weights of an adapter from a directory or the hub in the place of a loaded one.

    The name, and what is active and trainable, stay. Layers that the new adapter doesn't adapt
    get factors of zero. Ranks and scalings may differ; a compiled model that
    `prepare_model_for_compiled_hotswap` has seen is not compiled again.

    Args:
        model: the model; compiled or not.
        model_name_or_path: where the new adapter is.
        adapter_name: the adapter that is replaced.
        torch_device: where the tensors are read to; None is the CPU.
        kwargs: options for the hub.

    Raises:
        KeyMismatchError: the new adapter has weights for what the old one doesn't adapt.
        ConfigError: it is of another kind. Nothing has been changed.
        FoldError: the old one is folded into the base weights.
    """
    where = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
    file = read_adapter(model_name_or_path, device=torch_device or "cpu", **where)
    state = _state(model, adapter_name)
    check_hotswap_configs_compatible(state.configs[adapter_name], file.config)
    tensors = {plain_key(key): tensor for key, tensor in file.tensors.items()}
    _swap(model, state, adapter_name, tensors, file.config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """As `hotswap_adapter`, from tensors under their names in the model, adapter's name included.

    Args:
        model: the model.
        state_dict: the new weights.
        adapter_name: the adapter that is replaced.
        config: of the new one; it says the scalings.
        parameter_prefix: accepted; names are understood without it.
    """
    state = _state(model, adapter_name)
    tensors = {disk_key(key, adapter_name) or key: value for key, value in state_dict.items()}
    _swap(model, state, adapter_name, tensors, config)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Refuse to swap adapters that differ in more than targets, ranks and scalings.

    Raises:
        ConfigError: with all that differs.
    """
    first, second = (cast("Any", config) for config in (config0, config1))
    _refuse_shared_ranks((first, second))
    if first.peft_type != second.peft_type:
        kinds = [getattr(each.peft_type, "value", each.peft_type) for each in (first, second)]
        raise ConfigError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}")
    faults = [
        f"for {field}, {getattr(first, field)!r} != {getattr(second, field)!r}"
        for field in _COMPARED
        if getattr(first, field) != getattr(second, field)
    ]
    if second.target_parameters:
        faults.append("target_parameters: the factors of experts are not swapped")
    if type(variant_for(first)) is not type(variant_for(second)):
        kinds = [type(variant_for(each)).__name__ for each in (first, second)]
        faults.append(f"{kinds[0]} can't become {kinds[1]}")
    if faults:
        raise ConfigError(
            f"Configs are incompatible: {faults[0]}",
            faults=faults,
            cure="load it beside the old one: model.load_adapter(path, name), set_adapter(name)",
        )


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Make room in a model, before it is compiled, for adapters of other ranks and scalings.

    Scalings become tensors, which a compiled model reads anew each time; with `target_rank` the
    factors are padded with zeros. The outputs stay.

    Args:
        model: the model with the first adapter.
        target_rank: the largest rank of the adapters to come; None leaves the ranks.
        config: configs in which `r` and `rank_pattern` are set to `target_rank`; those of the
            model are kept up to date by themselves.
        check_compiled: what a model that is compiled already leads to: "error", "warn", "ignore".

    Raises:
        ConfigError: nothing to prepare, or a rank that doesn't fit; nothing has been changed.
    """
    _check_not_compiled(model, check_compiled)
    layers = dict(factored_layers(model))
    if not layers:
        raise ConfigError(
            "No adapter layers found on the model.",
            cure="load the first adapter before prepare_model_for_compiled_hotswap",
        )
    _refuse_shared_ranks(next(iter(layers.values())).adapter_state.configs.values())
    if target_rank is not None:
        _check_target_rank(layers, target_rank)
    for layer in layers.values():
        for name in layer.records:
            _make_room(layer, name, target_rank)
    if target_rank is None:
        return
    state = next(iter(layers.values())).adapter_state
    given = config if isinstance(config, dict) else {"": config} if config else {}
    for each in {id(c): c for c in (*given.values(), *state.configs.values())}.values():
        each.r = target_rank
        each.rank_pattern = dict.fromkeys(each.rank_pattern, target_rank)
    for name in state.configs:
        describe_numbers(layers, state.configs[name], name)


def _refuse_shared_ranks(configs: Iterable[Any]) -> None:
    if any(isinstance(config, AdaLoraConfig) for config in configs):
        raise ConfigError(
            "Hotswapping only supports LORA but ADALORA was passed.",
            cure="lamina.save_as_lora(path, model, rank) makes plain LoRA of an adapter",
        )


def _check_not_compiled(model: nn.Module, check: str) -> None:
    if not (hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False)):
        return
    if check == "error":
        raise ConfigError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
    if check == "warn":
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled; "
            "it will be compiled again.",
            stacklevel=3,
        )
    elif check != "ignore":
        raise ConfigError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check}' instead."
        )


def _check_target_rank(layers: Mapping[str, LoraLayer], target: int) -> None:
    faults = []
    for path, layer in layers.items():
        groups = groups_of(layer)
        if target % groups:
            faults.append(
                f"Trying to pad a Conv2d LoRA adapter with groups={groups} to target rank "
                f"{target}, but the target rank is not divisible by {groups}. Please choose a "
                f"target rank that is divisible by {groups}. ({path})"
            )
        for name in layer.records:
            rank = layer.factors(name)[0].shape[0]
            if rank > target:
                faults.append(
                    f"Trying to pad the adapter to the target rank {target}, but the original "
                    f"rank is larger ({rank}): {name!r} in {path}"
                )
    if faults:
        raise ConfigError(
            f"target_rank={target} doesn't fit.",
            faults=faults[:8],
            cure="choose one that is no smaller than any rank, and that all groups divide",
        )


def _make_room(layer: LoraLayer, name: str, target: int | None) -> None:
    record = layer.records[name]
    if not isinstance(record.scaling, torch.Tensor):
        # The record says float; a tensor of one number does all that a float does.
        device = layer.factors(name)[0].device
        scaling: Any = torch.tensor(record.scaling, device=device)
        layer.records[name] = replace(record, scaling=scaling)
    if target is None:
        return
    for leaf, factor in _factors(layer, name).items():
        if factor.shape[_side(leaf)] != _size(layer, leaf, target):
            set_factor(layer, name, leaf, padded(factor.detach(), leaf, target, groups_of(layer)))


# --- swapping ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """One tensor's new value: None is zero."""

    slot: Slot
    layer: LoraLayer | None
    value: torch.Tensor | None


def _state(model: nn.Module, adapter: str) -> AdapterState:
    state = find_state(model) or AdapterState()
    state.check_known([adapter])
    return state


def _swap(
    model: nn.Module,
    state: AdapterState,
    adapter: str,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
) -> None:
    layers = {n: layer for n, layer in factored_layers(model) if adapter in layer.records}
    if any(adapter in layer.merged_adapters for layer in layers.values()):
        raise FoldError(
            f"The adapter {adapter!r} is merged into the base weights; swapped now, it could "
            "never be taken out again.",
            cure="model.unmerge_adapter() first",
        )
    changes = _plan(slots(model, adapter, state), layers, tensors, adapter)
    scalings = _scalings(changes, config)
    with torch.no_grad(), on_base_of(model, state, adapter, config):
        for change in changes:
            _apply(change, adapter)
        for path, scaling in scalings.items():
            _set_scaling(layers[path], adapter, scaling)
    describe_numbers(layers, state.configs[adapter], adapter)


def _plan(
    wanted: Mapping[str, Slot],
    layers: Mapping[str, LoraLayer],
    tensors: Mapping[str, torch.Tensor],
    adapter: str,
) -> list[_Change]:
    """Every tensor's new value; all that doesn't fit is told at once."""
    given = _spelt_as(tensors, wanted)
    unexpected = sorted(given.keys() - wanted.keys())
    if unexpected:
        named = [_in_model(key, adapter) for key in unexpected]
        raise KeyMismatchError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(named)}.",
            faults=[
                f"{key.rpartition('.lora_')[0]} is not adapted by {adapter!r}" for key in named
            ],
            cure="load it beside the old one: model.load_adapter(path, name), set_adapter(name)",
        )
    changes, faults = [], []
    for key, slot in wanted.items():
        layer = layers.get(slot.module) if slot.kind == "factor" else None
        value = given.get(key)
        fault = _fault(slot, layer, value)
        if fault:
            faults.append(f"{key}: {fault}")
        changes.append(_Change(slot, layer, value))
    if faults:
        raise KeyMismatchError(
            f"Hot swapping the adapter did not succeed: {len(faults)} tensor(s) don't fit.",
            faults=faults[:8],
            cure="load it beside the old one: model.load_adapter(path, name), set_adapter(name)",
        )
    return changes


def _fault(slot: Slot, layer: LoraLayer | None, value: torch.Tensor | None) -> str | None:
    is_factor = layer is not None and slot.leaf in (*A_LEAVES, *B_LEAVES)
    if value is None:
        # A layer without factors is one without an update; nothing else may be zero.
        fits = is_factor or slot.leaf == "lora_B.bias"
        return None if fits else "the new adapter lacks it"
    ours, theirs = list(slot.tensor.shape), list(value.shape)
    if is_factor and len(ours) == len(theirs):
        side = _side(slot.leaf)
        ours[side] = theirs[side] = 0
    return None if ours == theirs else f"{list(value.shape)} instead of {list(slot.tensor.shape)}"


def _apply(change: _Change, adapter: str) -> None:
    slot, layer, value = change.slot, change.layer, change.value
    target = slot.tensor
    if value is None:
        target.zero_()
        return
    if layer is not None and value.shape != target.shape:
        side = _side(slot.leaf)
        rank = target.shape[side]
        if value.shape[side] > rank:
            # No room: the parameter is another one from now on.
            set_factor(layer, adapter, slot.leaf, value.to(target))
            return
        whole = rank if slot.leaf in A_LEAVES else rank * groups_of(layer)
        value = padded(value, slot.leaf, whole, groups_of(layer))
    target.copy_(value)


def _scalings(changes: list[_Change], config: LoraConfig) -> dict[str, float]:
    """Module -> what the new adapter's config gives there."""
    found = {}
    for change in changes:
        if change.layer is not None and change.value is not None:
            path = change.slot.module
            r, alpha = numbers(config, path.removeprefix(PREFIX))
            found[path] = LayerAdapter.of(config, r, alpha).scaling
    return found


def _set_scaling(layer: LoraLayer, adapter: str, scaling: float) -> None:
    current: Any = layer.records[adapter].scaling
    if isinstance(current, torch.Tensor):
        current.fill_(scaling)
    elif current != scaling:
        layer.scaling[adapter] = scaling


# --- names and shapes ----------------------------------------------------------------------------


def _factors(layer: LoraLayer, name: str) -> dict[str, nn.Parameter]:
    wanted = (*A_LEAVES, *B_LEAVES)
    return {leaf: p for leaf, p in layer.tensors(name).items() if leaf in wanted}


def _side(leaf: str) -> int:
    """The dimension of the rank: of A the first, of B the second."""
    return 0 if leaf in A_LEAVES else 1


def _size(layer: LoraLayer, leaf: str, rank: int) -> int:
    return rank if leaf in A_LEAVES else rank // groups_of(layer)


def _spelt_as(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, Slot]
) -> dict[str, torch.Tensor]:
    model_has = any(key.startswith(PREFIX) for key in wanted)
    found = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(PREFIX)
        found[respelt_bias(PREFIX + bare if model_has else bare, wanted)] = tensor
    return found


def _in_model(key: str, adapter: str) -> str:
    """`x.lora_A.weight` as it is called in the model: `x.lora_A.<adapter>.weight`."""
    for leaf in (*A_LEAVES, *B_LEAVES):
        if key.endswith(f".{leaf}"):
            place, _, rest = leaf.partition(".")
            head = key[: -len(leaf)]
            return f"{head}{place}.{adapter}.{rest}" if rest else f"{head}{place}.{adapter}"
    return key
