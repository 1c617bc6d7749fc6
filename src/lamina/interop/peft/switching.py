"""Switch adapters of a model, with or without a facade, by peft's functions."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lamina.engine import fold
from lamina.engine.inject import delete_adapter as remove
from lamina.engine.inject import find_state
from lamina.engine.layers import (
    LoraLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    lora_layers,
)
from lamina.engine.state import AdapterState
from lamina.engine.trainability import adapter_parameters, apply_trainability


def set_adapter(
    model: nn.Module,
    adapter_name: str | Iterable[str],
    inference_mode: bool = False,
    layer_cls: type[Any] = LoraLayer,
) -> None:
    """Make adapters active and, unless `inference_mode`, trainable, and no others."""
    state = find_state(model)
    if state is None:
        return
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    refuse_rivals(model, names)
    if any(layer.merged for _, layer in lora_layers(model)):
        warnings.warn(
            "Adapter cannot be set when the model is merged. Unmerging the model first.",
            stacklevel=2,
        )
        fold.unfold(model)
    state.activate(names)
    state.trainable = frozenset(() if inference_mode else names)
    apply_trainability(model, state)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "lora_", layer_cls: type[Any] = LoraLayer
) -> list[str] | None:
    """Remove an adapter.

    Returns:
        The adapters that are active now; None without any.
    """
    state = find_state(model)
    if state is None:
        return None
    if adapter_name in state.configs:
        remove_adapter(model, adapter_name, state)
    return list(state.active) or None


def begin_training_mode(model: nn.Module, adapter_name: str) -> None:
    """Let a new adapter drop entries until `eval()` is called, whatever mode its base is in."""
    for _, layer in lora_layers(model):
        if adapter_name not in layer.records:
            continue
        if adapter_name in layer.lora_dropout:
            layer.lora_dropout[adapter_name].train()
        layer.training = layer.training or len(layer.records) == 1


def remove_adapter(model: nn.Module, adapter_name: str, state: AdapterState) -> None:
    """Remove an adapter; where it was the only active one, tell which one takes over."""
    alone = tuple(state.active) == (adapter_name,)
    remove(model, adapter_name, state)
    if alone and state.active:
        warnings.warn(
            f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to "
            f"{state.active[0]}.",
            stacklevel=4,
        )


def set_requires_grad(
    model: nn.Module, adapter_names: str | Iterable[str], requires_grad: bool = True
) -> None:
    """Let adapters' weights ask for gradients, or not, whether they are active or not."""
    state = find_state(model)
    names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
    if state is None:
        return
    known = names & state.configs.keys()
    state.trainable = state.trainable | known if requires_grad else state.trainable - known
    for _, parameter in adapter_parameters(model, known):
        if parameter.is_floating_point():
            parameter.requires_grad_(requires_grad)


def switch_off(model: nn.Module, state: AdapterState) -> None:
    """Let the model answer as its base, until `switch_on`; nothing asks for gradients."""
    if any(layer.merged for _, layer in lora_layers(model)):
        fold.unfold(model)
    state.disabled = True
    state.show_biases()
    for _, parameter in adapter_parameters(model):
        parameter.requires_grad_(False)


def switch_on(model: nn.Module, state: AdapterState) -> None:
    """Let the active adapters take part again, in all layers, and train."""
    state.disabled = False
    state.drop_overrides()
    state.show_biases()
    state.trainable |= frozenset(state.active)
    apply_trainability(model, state)


def disabled(state: AdapterState) -> set[bool]:
    """Whether adapters are switched off: True, False, or both if layers differ."""
    if not state.overridden:
        return {state.disabled}
    return {member.disable_adapters for member in state.members}


def refuse_rivals(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to activate several adapters that replace the same module, or rows of one table.

    Raises:
        ValueError: there are some.
    """
    wanted = list(names)
    for module in model.modules() if len(wanted) > 1 else ():
        own: Any = ()
        if isinstance(module, ModulesToSaveWrapper):
            own = module.own_adapters()
        elif isinstance(module, TrainableTokensWrapper):
            own = module.token_adapter.own_adapters()
        rivals = [name for name in wanted if name in own]
        if len(rivals) > 1:
            raise ValueError(
                f"Only one adapter can be set at a time for {type(module).__name__}, got {rivals}."
            )


def cast_adapter_dtype(
    model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True
) -> None:
    """Bring an adapter's half-precision weights to fp32."""
    if not autocast_adapter_dtype:
        return
    for _, layer in lora_layers(model):
        if adapter_name not in layer.records:
            continue
        for leaf, parameter in layer.tensors(adapter_name).items():
            if parameter.is_floating_point() and parameter.element_size() < 4:
                layer.assign(adapter_name, leaf, parameter.data.to(torch.float32))
