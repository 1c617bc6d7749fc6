"""What every adapted layer, and the whole model, is doing at the moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from lamina.config import LoraConfig
from lamina.engine.inject import find_state
from lamina.engine.layers import LoraLayer, lora_layers
from lamina.engine.state import AdapterState
from lamina.engine.trainability import count_parameters
from lamina.errors import AdapterNameError

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One layer: which adapters it has, and which of them act, are folded in, train."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass
class TunerModelStatus:
    """The whole model; "irregular" where its layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular] = field(default_factory=dict)
    available_adapters: list[str] = field(default_factory=list)
    devices: dict[str, list[str]] = field(default_factory=dict)


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapted layer, in the model's order.

    Raises:
        AdapterNameError: the model has no adapters.
    """
    state = _state(model)
    inner = _inner(model)
    return [_layer_status(path, layer, state) for path, layer in lora_layers(inner)]


def _layer_status(path: str, layer: LoraLayer, state: AdapterState) -> TunerLayerStatus:
    here = list(layer.records)
    return TunerLayerStatus(
        name=path,
        module_type=f"lora.{type(layer).__name__}",
        enabled=not state.disabled,
        active_adapters=list(state.active),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={
            name: _uniform(p.requires_grad for p in layer.tensors(name).values()) for name in here
        },
        available_adapters=here,
        devices={
            name: sorted({str(p.device.type) for p in layer.tensors(name).values()})
            for name in here
        },
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the model as a whole.

    Raises:
        AdapterNameError: the model has no adapters.
    """
    state = _state(model)
    layers = get_layer_status(model)
    trainable, total = count_parameters(model)
    adapters = list(state.configs)
    merged: Any = _uniform(
        [n for n in layer.available_adapters if n in layer.merged_adapters]
        if layer.merged_adapters
        else []
        for layer in layers
    )
    return TunerModelStatus(
        base_model_type=type(_inner(model)).__name__,
        adapter_model_type="LoraModel" if hasattr(model, "base_model") else "None",
        peft_types={name: _kind(state.configs[name]) for name in adapters},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=not state.disabled,
        active_adapters=list(state.active),
        merged_adapters=merged,
        requires_grad={
            name: _uniform(x.requires_grad[name] for x in layers if name in x.requires_grad)
            for name in adapters
        },
        available_adapters=adapters,
        devices={
            name: sorted({d for layer in layers for d in layer.devices.get(name, [])})
            for name in adapters
        },
    )


def _uniform(values: Iterable[Any]) -> Any:
    """The one value that all have; "irregular" if they differ."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    if len(distinct) > 1:
        return "irregular"
    return distinct[0] if distinct else False


def _inner(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


def _state(model: nn.Module) -> AdapterState:
    state = find_state(model)
    if state is None:
        raise AdapterNameError(
            "The model has no adapters.", cure="lamina.get_peft_model(model, config)"
        )
    return state


def _kind(config: LoraConfig) -> str:
    kind = config.peft_type
    return str(getattr(kind, "value", kind))
