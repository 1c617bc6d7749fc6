"""Adapter weights as dicts of tensors, and adapters in models without a facade."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn

from lamina.checkpoint.keys import slots, taken
from lamina.checkpoint.load import fill_adapter
from lamina.checkpoint.ranks import without_lost_ranks
from lamina.checkpoint.report import LoadReport
from lamina.config import LoraConfig, PeftConfig
from lamina.engine.inject import delete_adapter, find_state, inject, strip_idle
from lamina.engine.state import AdapterState
from lamina.engine.trainability import apply_trainability
from lamina.errors import AdapterNameError
from lamina.model.adapted import refuse_adapted
from lamina.model.loading import undone_on_error


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Add an adapter to a model in place, without a facade around it, and activate it.

    Args:
        peft_config: what it adapts and how.
        model: any module.
        adapter_name: its name; a model may have several, unless another library added them.
        low_cpu_mem_usage: leave its weights on the meta device, to be loaded.
        state_dict: weights to begin from, by their names on disk; they are copied.

    Raises:
        TargetError, KeyMismatchError: the config or the weights don't fit; the model is unchanged.
    """
    config = cast(LoraConfig, copy.deepcopy(peft_config))
    state = find_state(model)
    if state is None:
        refuse_adapted(model)
        state = AdapterState()
    with undone_on_error(model) if not state.configs else nullcontext():
        inject(
            model,
            adapter_name,
            config,
            state,
            trainable=not config.inference_mode,
            initialise=not low_cpu_mem_usage and state_dict is None,
        )
        if state_dict is not None:
            _fill_or_delete(model, adapter_name, state, state_dict)
    state.activate([*state.active, adapter_name])
    apply_trainability(model, state)
    return model


def _fill_or_delete(
    model: nn.Module, adapter: str, state: AdapterState, state_dict: dict[str, torch.Tensor]
) -> None:
    try:
        fill_adapter(model, adapter, state, _own(state_dict))
    except BaseException:
        delete_adapter(model, adapter, state)
        strip_idle(model)
        raise


def _own(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies: the caller's tensors may be the parameters of another model."""
    return {key: tensor.detach().clone() for key, tensor in state_dict.items()}


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: Any = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by their names on disk (the adapter's name is left out).

    Args:
        model: a `PeftModel`, or a model with injected adapters; compiled or wrapped ones too.
        state_dict: take the tensors from here, e.g. gathered ones, by their names in the model.
        adapter_name: the adapter's whole name.
        unwrap_compiled: accepted; compiled models are understood anyway.
        save_embedding_layers: accepted; only the adapter's own tensors are returned.
    """
    found = slots(model, adapter_name, _state(model, adapter_name), alone=True)
    if state_dict is None:
        tensors = {key: slot.tensor for key, slot in found.items()}
    else:
        tensors = taken(found, adapter_name, state_dict)
    return without_lost_ranks(tensors, found, _state(model, adapter_name).configs[adapter_name])


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: bool = True,
) -> LoadReport:
    """Put tensors, by their names on disk, into an adapter of a model.

    Raises:
        KeyMismatchError: they are not exactly the adapter's; nothing has been changed.
    """
    return fill_adapter(
        model,
        adapter_name,
        _state(model, adapter_name),
        _own(peft_model_state_dict),
        strict=strict,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )


def _state(model: nn.Module, adapter: str) -> AdapterState:
    state = find_state(model)
    if state is None:
        raise AdapterNameError(
            "The model has no adapters.", cure="lamina.get_peft_model(model, config)"
        )
    state.check_known([adapter])
    return state
