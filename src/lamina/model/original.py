"""Adapters that changed the base when they began, written for the base as it was before.

PiSSA and its like leave `W - s B0 A0` in the base, so that what the adapter adds to the original
weight is `s (B A - B0 A0) = s [B, -B0] [A; A0]`: exact, at twice the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from lamina.checkpoint.origin import A_LEAVES, B_LEAVES, PREFIX
from lamina.config import LoraConfig
from lamina.engine.compose import Factors, concatenate
from lamina.engine.flat_config import flat_config
from lamina.engine.fold import give_back
from lamina.engine.init import changes_base
from lamina.engine.layers import LayerAdapter, LoraLayer, ModulesToSaveWrapper
from lamina.engine.layers.displacing import Displaced
from lamina.engine.names import adapted_layers, places
from lamina.engine.state import AdapterState
from lamina.engine.variants import variant_for
from lamina.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from lamina.model.facade import PeftModel


def displaced_by(base: nn.Module, adapter: str) -> dict[str, Displaced]:
    """Plain module name -> what an adapter took out of its weight."""
    return {
        module: layer.displaced[adapter]
        for module, layer in adapted_layers(base)
        if adapter in layer.displaced
    }


def with_taken(factors: Factors, taken: Displaced | None, scaling: float) -> Factors:
    """The update on the original weight, with `scaling` in front."""
    if taken is None:
        return concatenate([factors], scaling)
    device = factors.A.device
    before = Factors(taken.A.to(device), taken.B.to(device), -taken.scaling)
    return concatenate([factors, before], scaling)


def factors_on_original(layer: LoraLayer, adapter: str) -> Factors:
    """An adapter's update on the base as it was: `[B, -B0] [A; A0]` if it took something out."""
    a, b = (factor.detach() for factor in layer.factors(adapter))
    bias = layer.tensors(adapter).get("lora_B.bias")
    scaling = float(layer.records[adapter].scaling)
    own = Factors(a, b, scaling, None if bias is None else bias.detach())
    taken = layer.displaced.get(adapter)
    if taken is None or not taken.is_low_rank or layer.adapter_state.changes_stay:
        return own
    return with_taken(own, taken, scaling or taken.scaling)


@contextmanager
def on_base_of(
    model: nn.Module, state: AdapterState, adapter: str, config: LoraConfig
) -> Iterator[None]:
    """While an adapter's weights are replaced: make the base the one that the new ones are for.

    Args:
        model: the adapted model.
        state: its shared state.
        adapter: the adapter that is replaced.
        config: of the new weights.

    Raises:
        ConfigError: they are for a base that another initialisation has changed.
    """
    ours, init = state.configs[adapter], config.init_lora_weights
    if not state.changes_stay and changes_base(init) and init != ours.init_lora_weights:
        raise ConfigError(
            f"The new weights are for a base that init_lora_weights={init!r} has changed, and that "
            f"of {adapter!r} began with {ours.init_lora_weights!r}.",
            cure="load it beside the old one: model.load_adapter(path, name), set_adapter(name)",
        )
    stays = state.changes_stay or changes_base(init) or variant_for(ours).changes_base
    given = [] if stays else give_back(model, [adapter])
    try:
        yield
    except BaseException:
        for layer, name, taken in reversed(given):
            layer.take(name, taken)
        raise
    if given:
        ours.init_lora_weights = init


def scaling_of(config: LoraConfig) -> float:
    """The scaling that a config means where no pattern says otherwise."""
    return LayerAdapter.of(config, config.r, config.lora_alpha).scaling


def converted_config(
    base: nn.Module, adapter: str, config: LoraConfig, ranks: Mapping[str, int]
) -> LoraConfig:
    """The config of an adapter with these ranks, of plain LoRA."""
    saved = [
        place.name
        for place in places(base)
        if isinstance(place.module, ModulesToSaveWrapper)
        and adapter in place.module.modules_to_save
    ]
    return flat_config(base, config, [config], ranks, scaling_of(config), saved)


def on_original_base(
    model: PeftModel, adapter: str, config: LoraConfig, tensors: dict[str, torch.Tensor]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A file's config and tensors, such that the adapter is right on the original base.

    Adapters that left the base alone come back as they are; so do LoftQ's, whose base has lost
    what its quantisation loses anyway, and those of methods that change the base again wherever
    they are loaded (KaSA).

    Raises:
        CheckpointError: the adapter's method isn't a sum.
    """
    base = model.get_base_model()
    taken = {m: each for m, each in displaced_by(base, adapter).items() if each.is_low_rank}
    config_retakes = any(
        layer.records[adapter].variant.changes_base
        for _, layer in adapted_layers(base)
        if adapter in layer.records
    )
    if model.adapter_state.changes_stay or not taken or config_retakes:
        return config, tensors
    layers = {m: layer for m, layer in adapted_layers(base) if adapter in layer.records}
    _refuse_others(layers, adapter)
    scaling, ranks, whole = scaling_of(config), {}, dict(tensors)
    for module, layer in layers.items():
        a, b = (f"{PREFIX}{module}.{leaves[layer.is_embedding]}" for leaves in (A_LEAVES, B_LEAVES))
        own = Factors(tensors[a], tensors[b], layer.records[adapter].natural_scaling)
        joined = with_taken(own, taken.get(module), scaling)
        whole[a], whole[b], ranks[module] = joined.A, joined.B, joined.rank
    return converted_config(base, adapter, config, ranks), whole


def _refuse_others(layers: Mapping[str, LoraLayer], adapter: str) -> None:
    # DoRA's update follows from base and sum alone, and the sum of both is the same.
    others = [
        f"{module}: {type(layer.records[adapter].variant).__name__}"
        for module, layer in layers.items()
        if not (layer.records[adapter].variant.is_sum or layer.records[adapter].use_dora)
    ]
    if others:
        raise CheckpointError(
            f"The adapter {adapter!r} changed its base, and can't be written for the original one.",
            faults=others[:6],
            cure="begin it with init_lora_weights=True",
        )
