"""Combine adapters of a model into a new one: check all, compute all, then add it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.combine import Combined, Method, Part, Settings, combine, method_of
from lamina.engine.factored import factored_layers
from lamina.engine.flat_config import flat_config
from lamina.engine.inject import inject
from lamina.engine.layers import LoraLayer, ModulesToSaveWrapper
from lamina.engine.names import places
from lamina.engine.state import AdapterState
from lamina.errors import AdapterNameError, ConfigError
from lamina.model.combining_rows import fill_rows, union_of_rows
from lamina.model.original import factors_on_original


@dataclass(frozen=True)
class LayerReport:
    """What a combination did in one layer.

    Attributes:
        rank: of the result.
        relative_error: `‖result − sum‖_F / ‖sum‖_F`, where `sum` is the weighted sum of the
            updates; 0 where exact.
        exact: nothing was left out.
    """

    rank: int
    relative_error: float
    exact: bool


@dataclass(frozen=True)
class CombineReport:
    """What a combination did.

    Attributes:
        adapter: the name of the new adapter.
        method: how it was combined.
        layers: plain module name -> what was done there.
        relative_error: as in a layer, over all layers together.
    """

    adapter: str
    method: str
    layers: Mapping[str, LayerReport]
    relative_error: float

    @property
    def exact(self) -> bool:
        """Whether nothing was left out in any layer."""
        return all(layer.exact for layer in self.layers.values())

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers.values())

    def __str__(self) -> str:
        how = "exact" if self.exact else f"relative error {self.relative_error:.3g}"
        many = f"{len(self.layers)} layers, rank up to {self.rank}"
        return f"{self.adapter!r} by {self.method}: {how} ({many})"


def add_weighted_adapter(
    model: nn.Module,
    state: AdapterState,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    method: str = "svd",
    settings: Settings | None = None,
) -> CombineReport:
    """Add an adapter to `model` that is made of others; see `LoraModel.add_weighted_adapter`."""
    settings = settings or Settings()
    row = method_of(method)
    _check_arguments(state, adapters, weights, adapter_name, row, settings)
    shares = dict(zip(_distinct(adapters), _summed(adapters, weights), strict=True))
    layers = {
        name: layer
        for name, layer in factored_layers(model)
        if any(adapter in layer.records for adapter in shares)
    }
    _check_layers(layers, shares, row, settings)
    wrappers = _saved_wrappers(model, shares)
    made = {
        name: combine(_parts(layer, shares, row), row, settings) for name, layer in layers.items()
    }
    config = _config(model, state, list(shares), made, list(wrappers))
    inject(model, adapter_name, config, state, trainable=False, initialise=False, strict=False)
    _fill(layers, made, adapter_name, config.lora_bias)
    for wrapper, owner in wrappers.values():
        wrapper.modules_to_save[adapter_name].load_state_dict(
            wrapper.modules_to_save[owner].state_dict()
        )
    _fill_biases(state, shares, adapter_name)
    fill_rows(model, shares, adapter_name)
    return _report(adapter_name, method, made)


# --- validate ------------------------------------------------------------------------------------


def _check_arguments(
    state: AdapterState,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    method: Method,
    settings: Settings,
) -> None:
    if not adapters:
        raise AdapterNameError(
            "There are no adapters to combine: the list is empty.",
            cure=f"name some of {', '.join(map(repr, state.configs))}",
        )
    unknown = [adapter for adapter in adapters if adapter not in state.configs]
    if unknown:
        raise AdapterNameError(
            f"Adapter {unknown[0]} does not exist"
            + (f", nor {', '.join(map(repr, unknown[1:]))}" if unknown[1:] else "")
            + f"; the model has: {', '.join(map(repr, state.configs))}.",
            cure="name adapters of the model, or load them first",
        )
    state.check_new_name(name)
    faults = [
        *_faults_of_weights(adapters, weights),
        *_faults_of_settings(method, settings),
        *_faults_of_configs(state, adapters),
    ]
    if faults:
        raise ConfigError(
            f"The adapters can't be combined by {method.name!r} like this.",
            faults=faults,
            cure="correct the arguments; nothing has been changed",
        )


def _faults_of_weights(adapters: Sequence[str], weights: Sequence[float]) -> list[str]:
    if len(adapters) != len(weights):
        return [f"{len(adapters)} adapters and {len(weights)} weights: give one for each"]
    return [
        f"the weight {weight!r} of {adapter!r} is not a finite number"
        for adapter, weight in zip(adapters, weights, strict=True)
        if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight)
    ]


def _faults_of_settings(method: Method, settings: Settings) -> list[str]:
    faults = []
    density = settings.density
    if method.takes_density and density is None:
        faults.append("density is needed: the share of entries to keep, above 0 and up to 1")
    elif method.takes_density and not 0 < float(density or 0) <= 1:
        faults.append(f"density={density!r}: above 0 and up to 1, which keeps all")
    if settings.majority not in ("total", "frequency"):
        faults.append(f"majority_sign_method={settings.majority!r}: 'total' or 'frequency'")
    if settings.rank is not None and (isinstance(settings.rank, bool) or settings.rank < 1):
        faults.append(f"svd_rank={settings.rank!r}: a positive integer, or None")
    if settings.clamp is not None and not 0 < settings.clamp <= 1:
        faults.append(f"svd_clamp={settings.clamp!r}: a quantile, above 0 and up to 1")
    return faults


def _faults_of_configs(state: AdapterState, adapters: Sequence[str]) -> list[str]:
    """What an adapter trains beside factors and modules, and can't be combined."""
    faults = []
    tokens = {tuple(state.configs[a].alora_invocation_tokens or ()) for a in adapters}
    if len(tokens) > 1:
        faults.append("they act on different tokens: alora_invocation_tokens differ")
    for adapter in _distinct(adapters):
        config: Any = state.configs[adapter]
        if config.target_parameters:
            faults.append(
                "add_weighted_adapter does not support targeting nn.Parameter "
                f"(problematic adapter '{adapter}')"
            )
    return faults


def _check_layers(
    layers: Mapping[str, LoraLayer],
    shares: Mapping[str, float],
    method: Method,
    settings: Settings,
) -> None:
    if not layers:
        raise ConfigError(
            f"{', '.join(map(repr, shares))} adapt no layer of this model; nothing to combine."
        )
    faults = [
        f"{name}: {fault}"
        for name, layer in layers.items()
        for fault in _faults_of_layer(layer, shares, method, settings)
    ]
    if faults:
        raise ConfigError(
            f"{method.name!r} can't combine the adapters in {len(faults)} place(s).",
            faults=faults[:8],
            cure="combination_type='cat' takes any ranks, 'svd' any ranks and kinds of LoRA",
        )


def _faults_of_layer(
    layer: LoraLayer, shares: Mapping[str, float], method: Method, settings: Settings
) -> list[str]:
    here = [adapter for adapter in shares if adapter in layer.records]
    faults = [f"{a!r} has no weights yet" for a in here if layer.factors(a)[0].is_meta]
    ranks = {adapter: layer.factors(adapter)[0].shape[0] for adapter in here}
    if method.on == "factors" and len(set(ranks.values())) > 1:
        faults.append(f"adapters must have the same r value, and have {ranks}")
    groups = getattr(layer.base_layer, "groups", 1)
    if method.on == "update" and settings.rank is not None and settings.rank % groups:
        faults.append(f"its {groups} groups don't divide svd_rank={settings.rank}")
    for adapter in here:
        if method.on == "factors" and layer.taken_out({adapter}) is not None:
            faults.append(f"{adapter!r} took a part out of the base, which is no part of A or B")
        if not _is_product(layer, adapter):
            faults.extend(_faults_of_variant(layer, adapter, method))
    return faults


def _faults_of_variant(layer: LoraLayer, adapter: str, method: Method) -> list[str]:
    kind = type(layer.records[adapter].variant).__name__
    if method.on != "update":
        return [f"{adapter!r} is {kind}, whose update is not scaling * B @ A"]
    why = layer.records[adapter].variant.why_not_foldable(layer, adapter)
    if why is None and layer.merged_adapters:
        why = "adapters are folded in; model.unmerge_adapter() first"
    return [f"{adapter!r} is {kind}, whose update can't be had: {why}"] if why else []


def _saved_wrappers(
    model: nn.Module, adapters: Mapping[str, float]
) -> dict[str, tuple[ModulesToSaveWrapper, str]]:
    """Plain name -> (wrapper, the adapter whose copy is taken over)."""
    found = {}
    several = []
    for place in places(model):
        if isinstance(place.module, ModulesToSaveWrapper):
            owners = [a for a in adapters if a in place.module.modules_to_save]
            if owners:
                found[place.name] = (place.module, owners[0])
            if len(owners) > 1:
                several.append(f"{place.name} is trained by {', '.join(map(repr, owners))}")
    if several:
        raise ConfigError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, "
            f"but found {len(several)} such instance(s).",
            faults=several,
            cure="combine adapters of which at most one trains the module whole",
        )
    return found


# --- compute -------------------------------------------------------------------------------------


def is_sum(layer: LoraLayer, adapter: str) -> bool:
    """Whether an adapter's update is `scaling * B @ A` and nothing else."""
    return layer.records[adapter].variant.is_sum


def _is_product(layer: LoraLayer, adapter: str) -> bool:
    """Whether an adapter's update is that where it acts: all act on the same tokens."""
    gated = layer.records[adapter].config.alora_invocation_tokens is not None
    return gated or is_sum(layer, adapter)


@torch.no_grad()
def dense_update(layer: LoraLayer, adapter: str) -> torch.Tensor:
    """What an adapter changes in the base as it was: out x all else, in the accumulation dtype."""
    if is_sum(layer, adapter):
        update = layer.delta_weight(adapter)
    else:
        before = layer.weight_view.read()
        update, _ = layer.folded([adapter])
        update = update - before.to(update)
    taken = layer.taken_out({adapter})
    update = update if taken is None else update - taken
    stored_in_by_out = layer.is_embedding or getattr(layer, "fan_in_fan_out", False)
    return (update.T if stored_in_by_out else update).flatten(1)


def _parts(layer: LoraLayer, shares: Mapping[str, float], method: Method) -> list[Part]:
    parts = []
    for adapter, weight in shares.items():
        if adapter not in layer.records:
            continue
        factors = factors_on_original(layer, adapter)
        special = method.on == "update" and not _is_product(layer, adapter)
        parts.append(Part(factors, weight, dense_update(layer, adapter) if special else None))
    return parts


def _config(
    model: nn.Module,
    state: AdapterState,
    adapters: Sequence[str],
    made: Mapping[str, Combined],
    saved: Sequence[str],
) -> LoraConfig:
    configs = [state.configs[adapter] for adapter in adapters]
    first = configs[0]
    # Afresh: what makes an adapter special is in the factors now.
    plain = LoraConfig(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        lora_dropout=first.lora_dropout,
        fan_in_fan_out=first.fan_in_fan_out,
        layer_replication=first.layer_replication,
        alora_invocation_tokens=first.alora_invocation_tokens,
        trainable_token_indices=union_of_rows(
            model, {adapter: state.configs[adapter] for adapter in adapters}
        ),
    )
    ranks = {name: combined.factors.rank for name, combined in made.items()}
    return flat_config(model, plain, configs, ranks, 1.0, saved)


# --- apply ---------------------------------------------------------------------------------------


def _fill(
    layers: Mapping[str, LoraLayer], made: Mapping[str, Combined], name: str, biased: bool
) -> None:
    for path, layer in layers.items():
        factors = made[path].factors
        leaves = [leaf for leaf in layer.tensors(name) if not leaf.endswith(".bias")]
        values = list(zip(leaves, (factors.A, factors.B), strict=True))
        if biased:
            none = factors.B.new_zeros(factors.B.shape[0])
            values.append(("lora_B.bias", none if factors.bias is None else factors.bias))
        for leaf, value in values:
            layer.assign(name, leaf, value.clone())


def _fill_biases(state: AdapterState, shares: Mapping[str, float], name: str) -> None:
    """The base's biases: their own values plus the weighted sum of what adapters changed."""
    biases = state.biases
    for key in biases.values.get(name, {}):
        shown = biases.shown[key]
        original = biases.parameters[key].data if shown is None else biases.original[key]
        total = original.double()
        for adapter, weight in shares.items():
            theirs = biases.of(adapter).get(key)
            if theirs is not None:
                total = total + weight * (theirs.double() - original.double())
        biases.values[name][key] = total.to(original.dtype)


def _report(name: str, method: str, made: Mapping[str, Combined]) -> CombineReport:
    error = math.hypot(*(combined.error for combined in made.values()))
    norm = math.hypot(*(combined.norm for combined in made.values()))
    return CombineReport(
        adapter=name,
        method=method,
        layers={
            path: LayerReport(each.factors.rank, _ratio(each.error, each.norm), each.exact)
            for path, each in made.items()
        },
        relative_error=_ratio(error, norm),
    )


def _ratio(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    return error / norm if norm else math.inf


def _distinct(adapters: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(adapters))


def _summed(adapters: Sequence[str], weights: Sequence[float]) -> list[float]:
    """The weight of each distinct adapter: that of one named twice counts twice."""
    return [
        sum(w for adapter, w in zip(adapters, weights, strict=True) if adapter == name)
        for name in _distinct(adapters)
    ]
