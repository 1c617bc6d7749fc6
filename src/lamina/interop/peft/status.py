"""What every adapted layer, and the whole model, is doing at the moment, by peft's account.

It is read off the layers' parameters, so that it tells of layers that somebody has changed by hand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lamina.engine.layers import LoraLayer, ModulesToSaveWrapper
from lamina.engine.trainability import count_parameters
from lamina.interop.peft.facade import PeftModel
from lamina.interop.peft.quantization import resolve_quantization_backend
from lamina.model import status as native

IRREGULAR: native.Irregular = "irregular"


@dataclass
class TunerLayerStatus(native.TunerLayerStatus):
    """One layer, and the quantiser of its base."""

    quantization_backend: str | None


@dataclass
class TunerModelStatus(native.TunerModelStatus):
    """The whole model; "irregular" where its layers differ."""

    quantization_backend: str | None = None


def get_layer_status(model: Any) -> list[TunerLayerStatus]:
    """The status of each adapted layer and each module trained whole, in the model's order.

    Raises:
        ValueError: there are none.
    """
    inner = model.base_model if isinstance(model, PeftModel) else model
    found = [
        _layer_status(name, module)
        for name, module in inner.named_modules()
        if isinstance(module, (LoraLayer, ModulesToSaveWrapper))
    ]
    if not found:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that "
            "you have PEFT adapters injected in the model."
        )
    return found


def _layer_status(name: str, module: Any) -> TunerLayerStatus:
    parameters = _parameters(module)
    layer = isinstance(module, LoraLayer)
    backend = module.__dict__.get("quantization_backend")
    if backend is None and layer:
        backend = resolve_quantization_backend(module.get_base_layer())
    return TunerLayerStatus(
        name=name,
        module_type=_kind(module),
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(getattr(module, "merged_adapters", ())),
        requires_grad={k: _agreed(p.requires_grad for p in ps) for k, ps in parameters.items()},
        available_adapters=sorted(parameters),
        devices={k: sorted({p.device.type for p in ps}) for k, ps in parameters.items()},
        quantization_backend=getattr(backend, "backend_name", None),
    )


def _kind(module: Any) -> str:
    return repr(module).partition("(")[0]


def _parameters(module: Any) -> dict[str, list[nn.Parameter]]:
    """Adapter -> its parameters here, whoever has put them there."""
    found: dict[str, list[nn.Parameter]] = defaultdict(list)
    for place, held in module.named_children():
        if place in ("base_layer", "original_module", "ranknum"):
            continue
        if isinstance(held, nn.ModuleDict):
            for name, inner in held.items():
                found[name].extend(inner.parameters())
        elif isinstance(held, nn.ParameterDict):
            for name, parameter in held.items():
                found[name].append(parameter)
    return {name: parameters for name, parameters in found.items() if parameters}


def _agreed(values: Iterable[Any]) -> Any:
    """The one value that all have; "irregular" if they differ."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct[0] if len(distinct) == 1 else IRREGULAR


def get_model_status(model: Any) -> TunerModelStatus:
    """The status of the model as a whole.

    Raises:
        ValueError: it has no adapters.
    """
    from transformers import PreTrainedModel

    layers = get_layer_status(model)
    whole = isinstance(model, PeftModel)
    named = model.get_base_model() if whole else model
    known = whole or isinstance(model, PreTrainedModel)
    trainable, total = count_parameters(model)
    by_adapter: dict[str, list[TunerLayerStatus]] = defaultdict(list)
    for layer in layers:
        for name in layer.requires_grad:
            by_adapter[name].append(layer)
    return TunerModelStatus(
        base_model_type=type(named).__name__ if known else "other",
        adapter_model_type=type(model.base_model).__name__ if whole else "None",
        peft_types=_methods(model) if whole else {},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=_agreed(layer.active_adapters for layer in layers),
        merged_adapters=_merged(layers),
        requires_grad={
            name: _agreed(layer.requires_grad[name] for layer in own)
            for name, own in by_adapter.items()
        },
        available_adapters=sorted({n for layer in layers for n in layer.available_adapters}),
        devices={
            name: sorted({device for layer in own for device in layer.devices[name]})
            for name, own in by_adapter.items()
        },
        quantization_backend=_agreed(layer.quantization_backend for layer in layers),
    )


def _methods(model: Any) -> dict[str, str]:
    kinds = {name: config.peft_type for name, config in model.peft_config.items()}
    return {name: str(getattr(kind, "value", kind)) for name, kind in kinds.items()}


def _merged(layers: list[TunerLayerStatus]) -> list[str] | native.Irregular:
    merged = {name for layer in layers for name in layer.merged_adapters}
    for layer in layers:
        if (set(layer.available_adapters) - set(layer.merged_adapters)) & merged:
            return IRREGULAR
    return sorted(merged)
