"""Which parameters ask for gradients: explicit, and never a side effect of anything else.

A parameter of an adapter asks for one when the adapter is declared trainable and is active.
Parameters of the base don't, except biases that a trainable adapter trains along.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import nn

from lamina.engine.layers import lora_layers, saved_modules
from lamina.engine.state import AdapterState


def adapter_parameters(
    model: nn.Module, adapters: Collection[str] | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """(adapter, parameter) for every parameter of these adapters (None: all), without biases."""
    for _, holder in (*lora_layers(model), *saved_modules(model)):
        names = holder.own_adapters()
        for name in names if adapters is None else set(names) & set(adapters):
            for parameter in holder.trained_parameters(name):
                yield name, parameter


def live_adapters(state: AdapterState) -> frozenset[str]:
    """The adapters whose parameters ask for gradients: trainable and active."""
    return state.trainable & set(state.active)


def apply_trainability(
    model: nn.Module, state: AdapterState, adapters: Collection[str] | None = None
) -> None:
    """Set `requires_grad` of adapter parameters to what `state` declares.

    Args:
        model: the adapted model.
        state: its shared state.
        adapters: those for which something has changed; None means all.
    """
    live = live_adapters(state)
    for name, parameter in adapter_parameters(model, adapters):
        wanted = name in live and _differentiable(parameter)
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)
    apply_bias_trainability(state)


def apply_bias_trainability(state: AdapterState) -> None:
    """Set `requires_grad` of the base's biases, which go by the adapter whose values they hold."""
    live = live_adapters(state)
    for name, parameter in state.biases.parameters.items():
        parameter.requires_grad_(state.biases.owner(name, state.active) in live)


def _differentiable(parameter: nn.Parameter) -> bool:
    return parameter.dtype.is_floating_point or parameter.dtype.is_complex


def freeze_base(model: nn.Module) -> None:
    """Stop every parameter of a model that is about to be adapted from asking for gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def declare_trainable(model: nn.Module, state: AdapterState, names: Iterable[str]) -> None:
    """Let exactly these adapters be trainable."""
    state.trainable = frozenset(state.check_known(names))
    apply_trainability(model, state)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters; a packed 4-bit weight counts its elements."""
    trainable = total = 0
    for parameter in model.parameters():
        count = _elements(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _elements(parameter: nn.Parameter) -> int:
    # ZeRO-3 keeps an empty local tensor and the real size beside it.
    count = parameter.numel() or int(getattr(parameter, "ds_numel", 0))
    if type(parameter).__name__ == "Params4bit":
        return count * 2 * parameter.element_size()
    return count
