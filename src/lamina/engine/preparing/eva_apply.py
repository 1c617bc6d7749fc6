"""Put EVA's directions into an adapter: ranks, factors and config, as one step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lamina.engine.inject import find_state, strip_idle
from lamina.engine.layers import LayerAdapter, LoraLayer, lora_layers
from lamina.engine.names import adapted_layers, places
from lamina.engine.state import AdapterState
from lamina.engine.targets import spell
from lamina.engine.trainability import apply_trainability
from lamina.errors import InitialisationError

_PREFIX = "base_model.model."

# More names than these are written by their endings.
_MANY = 20


def check_adapter(model: nn.Module, adapter: str) -> AdapterState:
    """The state of a model whose adapter can begin by EVA.

    Raises:
        InitialisationError: with everything that is wrong.
    """
    state = find_state(model)
    if state is None:
        raise InitialisationError(
            "model must be a PeftModel", cure="get_peft_model(model, LoraConfig(...)) first"
        )
    state.check_known([adapter])
    faults = []
    if len(state.active) > 1:
        faults.append(
            "`initialize_lora_eva_weights` currently only works with a single active adapter"
        )
    if state.configs[adapter].init_lora_weights != "eva":
        faults.append(
            "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`"
        )
    if any(adapter in layer.merged_adapters for _, layer in lora_layers(model)):
        faults.append(f"{adapter!r} is folded into the base weights")
    if faults:
        raise InitialisationError(
            f"EVA can't begin the adapter {adapter!r}.",
            faults=faults,
            cure="LoraConfig(init_lora_weights='eva', ...), active alone, and not folded",
        )
    return state


def apply_state_dict(
    model: nn.Module, state: AdapterState, adapter: str, directions: Mapping[str, torch.Tensor]
) -> None:
    """Give each layer its rank and its A; B is zero.

    Raises:
        InitialisationError: the directions aren't those of the adapter's layers; it is unchanged.
    """
    here = {name: layer for name, layer in lora_layers(model) if adapter in layer.records}
    directions = _named_as(here, directions)
    _check_directions(here, directions)
    plain = {id(layer): name for name, layer in adapted_layers(model)}
    config = state.configs[adapter]
    settings: Any = config.eva_config
    ranks, alphas, kept, missing = {}, {}, [], []
    for name, layer in here.items():
        own, record = plain[id(layer)].removeprefix(_PREFIX), layer.records[adapter]
        if name not in directions:
            _begin(layer, adapter, record, None)
            missing.append(own)
            r, alpha = record.r, record.lora_alpha
        else:
            r, alpha = directions[name].shape[0], record.lora_alpha
            if r != record.r and settings.adjust_scaling_factors:
                alpha *= r / record.r
            if r == 0:
                layer.delete_adapter(adapter)
                continue
            new = LayerAdapter.of(config, r, alpha, record.target)
            _begin(layer, adapter, new, directions[name])
        kept.append(own)
        if r != config.r:
            ranks[own] = r
        if alpha != config.lora_alpha:
            alphas[own] = alpha
    strip_idle(model)
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    config.target_modules = _spelt(model, kept)
    apply_trainability(model, state, {adapter})
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were "
            f"not found in the eva state_dict: {missing}\nEVA is made for linear layers.",
            stacklevel=3,
        )


def _named_as(
    here: Mapping[str, LoraLayer], directions: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Directions of the plain model, by the names that its layers have now that it is wrapped."""
    plain = {name.removeprefix(_PREFIX): name for name in here}
    return {plain.get(name, name): tensor for name, tensor in directions.items()}


def _check_directions(
    here: Mapping[str, LoraLayer], directions: Mapping[str, torch.Tensor]
) -> None:
    faults = [f"{name}: no adapted layer has this name" for name in directions if name not in here]
    for name, layer in here.items():
        if name not in directions:
            continue
        features, shape = layer.in_features, tuple(directions[name].shape)
        if len(shape) != 2 or shape[1] != features:
            faults.append(f"{name}: directions of shape {shape}, and A is rank x {features}")
        elif not bool(torch.isfinite(directions[name]).all()):
            faults.append(f"{name}: its directions have NaN or Inf in them")
    if directions and all(tensor.shape[0] == 0 for tensor in directions.values()):
        faults.append("no layer would have any rank left")
    if faults:
        raise InitialisationError(
            f"The EVA state dict doesn't fit the adapter: {len(faults)} fault(s).",
            faults=faults[:8],
            cure="get_eva_state_dict(model, dataloader) on this very model",
        )


def _begin(
    layer: LoraLayer, adapter: str, record: LayerAdapter, directions: torch.Tensor | None
) -> None:
    """Begin anew with a record; the factors keep their dtype."""
    dtype = layer.factors(adapter)[0].dtype
    layer.delete_adapter(adapter)
    layer.add_adapter(adapter, record, init=True, upcast=dtype == torch.float32)
    if directions is not None:
        a, _ = layer.factors(adapter)
        a.data.copy_(directions)


def _spelt(model: nn.Module, names: list[str]) -> set[str]:
    if len(names) < _MANY:
        return set(names)
    everything = list(places(model))
    adorned = any(place.name.startswith(_PREFIX) for place in everything)
    whole = {_PREFIX + name if adorned else name for name in names}
    return {name.removeprefix(_PREFIX) for name in spell(everything, whole)}
