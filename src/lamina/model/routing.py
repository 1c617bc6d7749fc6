"""What a call of the facade says of rows and tokens: checked, and made a `Routing` of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from lamina.engine.layers import lora_layers
from lamina.engine.layers.mixing import refuse_folded
from lamina.engine.routing import BASE, Routing
from lamina.engine.state import AdapterState
from lamina.engine.variants.alora import invocation_offsets
from lamina.errors import AdapterNameError, RoutingError, nearest

# Where the prompt of a generation, or the ids of a forward, may be found.
_IDS = ("input_ids", "inputs")


def routed(
    model: nn.Module,
    state: AdapterState,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    generates: bool = False,
) -> AbstractContextManager[None]:
    """A context in which the model's layers send rows their ways; mostly there is nothing to send.

    `adapter_names` and `alora_offsets` are taken out of `kwargs`. Offsets that weren't given are
    found in the ids, for adapters with `alora_invocation_tokens`.

    Args:
        model: the adapted model.
        state: its shared state.
        args: of the call.
        kwargs: likewise.
        generates: whether it is a generation.

    Raises:
        AdapterNameError: there are no such adapters.
        RoutingError: not a name for each row, or now is not the time; nothing has been computed.
    """
    names = kwargs.pop("adapter_names", None)
    offsets = kwargs.pop("alora_offsets", None)
    if state.disabled:
        # Off is off, whatever the rows ask for.
        return nullcontext()
    rows = None if names is None else _checked(names, model, state, args, kwargs)
    acting = _acting(state, rows)
    if rows is None and not acting:
        return nullcontext()
    found = _offsets(acting, offsets, args, kwargs, generates)
    ids = _ids(args, kwargs)
    whole = generates and ids is not None and kwargs.get("use_cache") is False
    routing = Routing(
        names=rows,
        offsets=found,
        expansion=_expansion(model, kwargs) if generates else 1,
        length=ids.shape[-1] if whole and ids is not None else None,
    )
    return _in_force(model, state, routing)


@contextmanager
def _in_force(model: nn.Module, state: AdapterState, routing: Routing) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(state.routed(routing))
        if model.training and routing.offsets:
            stack.enter_context(_kept_for_recomputing(model, state, routing))
        yield


@contextmanager
def _kept_for_recomputing(
    model: nn.Module, state: AdapterState, routing: Routing
) -> Iterator[None]:
    """Let checkpointed layers compute again, in the backward, by the routing of their forward."""
    layers: list[Any] = [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
        and callable(getattr(module, "_gradient_checkpointing_func", None))
    ]
    before = [(layer, layer._gradient_checkpointing_func) for layer in layers]
    for layer, checkpoint in before:
        layer._gradient_checkpointing_func = partial(_checkpointed, checkpoint, state, routing)
    try:
        yield
    finally:
        for layer, checkpoint in before:
            layer._gradient_checkpointing_func = checkpoint


def _checkpointed(
    checkpoint: Any, state: AdapterState, routing: Routing, function: Any, *args: Any, **kwargs: Any
) -> Any:
    def again(*inputs: Any, **more: Any) -> Any:
        with state.routed(routing):
            return function(*inputs, **more)

    return checkpoint(again, *args, **kwargs)


# --- names ---------------------------------------------------------------------------------------


def _checked(
    names: Any,
    model: nn.Module,
    state: AdapterState,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise RoutingError(
            f"adapter_names={names!r} is no list of names.",
            cure=f"one name for each row of the batch, {BASE!r} where no adapter should act",
        )
    if model.training:
        raise RoutingError(
            "Cannot pass `adapter_names` when the model is in training mode.", cure="model.eval()"
        )
    _check_known(names, state)
    _check_biases(names, state)
    if state.folded_layers:
        refuse_folded([n for _, layer in lora_layers(model) for n in layer.merged_adapters][:1])
    batch = _batch(args, kwargs)
    if batch is not None:
        Routing(tuple(names)).repeats(batch)
    return tuple(names)


def _check_known(names: Sequence[str], state: AdapterState) -> None:
    unknown = sorted({*names} - {BASE, *state.configs})
    if unknown:
        raise AdapterNameError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}",
            faults=[
                f"did you mean {close!r} instead of {name!r}?"
                for name in unknown
                for close in nearest(name, [BASE, *state.configs])
            ],
            cure=f"name some of: {', '.join(map(repr, [BASE, *state.configs]))}",
        )


def _check_biases(names: Sequence[str], state: AdapterState) -> None:
    """Refuse rows whose adapters would need other biases of the base than those in it now."""
    biases = state.biases
    faults = []
    for name in dict.fromkeys(names):
        own = () if name == BASE else (name,)
        other = [each for each, shown in biases.shown.items() if biases.owner(each, own) != shown]
        if other:
            faults.append(f"{name!r} has other values in {len(other)} biases, such as {other[0]}")
    if faults:
        raise RoutingError(
            "The rows of a batch share the base's biases, and adapters with bias='all' or "
            "'lora_only' train them.",
            faults=faults,
            cure="answer for one adapter at a time: model.set_adapter(name)",
        )


def _batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The rows of a call, as far as its first tensor tells."""
    named = [kwargs[name] for name in (*_IDS, "inputs_embeds") if kwargs.get(name) is not None]
    tensors = [value for value in (*args, *named) if isinstance(value, torch.Tensor)]
    return tensors[0].shape[0] if tensors and tensors[0].dim() > 1 else None


# --- tokens --------------------------------------------------------------------------------------


def _acting(state: AdapterState, rows: tuple[str, ...] | None) -> dict[str, Sequence[int]]:
    """adapter -> its invocation, for those that take part and act from a token on."""
    names = state.active if rows is None else dict.fromkeys(rows)
    found: dict[str, Sequence[int]] = {}
    for name in names:
        tokens = state.configs[name].alora_invocation_tokens if name != BASE else None
        if tokens is not None:
            found[name] = tokens
    return found


def _offsets(
    acting: Mapping[str, Sequence[int]],
    given: Sequence[int | None] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    generates: bool,
) -> dict[str, list[int | None]]:
    """adapter -> offsets: those that were given, or where its invocation is in the ids."""
    if not acting:
        return {}
    if given is not None:
        return {name: list(given) for name in acting}
    ids = _ids(args, kwargs)
    if ids is None:
        warn_unfound(generates=generates)
        return {}
    return {name: invocation_offsets(ids, tokens) for name, tokens in acting.items()}


def warn_unfound(*, generates: bool) -> None:
    """Say that an adapter with an invocation can't act, because there are no ids to find it in."""
    warnings.warn(
        "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling "
        "aLoRA."
        if generates
        else "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA "
        "for this forward pass.",
        stacklevel=2,
    )


def _ids(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    named = [kwargs[name] for name in _IDS if kwargs.get(name) is not None]
    for value in (*named, *args[:1]):
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            continue
        if value.dim() in (1, 2):
            return value.unsqueeze(0) if value.dim() == 1 else value
    return None


def _expansion(model: Any, kwargs: Mapping[str, Any]) -> int:
    """How many rows a generation makes of one."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    wanted = [
        kwargs.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    ]
    return int(max(wanted))
