"""Checks before training begins and after its first backward: the right thing trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.engine.fold import folded_adapters
from lamina.engine.inject import find_state
from lamina.engine.layers import lora_layers, saved_modules
from lamina.engine.state import AdapterState
from lamina.errors import PreflightError

_SHOWN = 6


def preflight(model: nn.Module) -> None:
    """Refuse to train a model in which nothing, or the wrong thing, would train.

    Raises:
        PreflightError: with all that is wrong: no adapter at all; no trainable parameter; a
            trainable adapter that is inactive, folded in or switched off; weights on meta.
    """
    state = find_state(model)
    if state is None:
        raise PreflightError(
            "The model has no adapters.",
            cure="model = lamina.get_peft_model(model, config), or lamina.begin_stage(...)",
        )
    faults = _faults(model, state)
    if faults:
        raise PreflightError(
            "Training would run and train nothing, or the wrong thing.",
            faults=faults,
            cure=_cure(state),
        )


def _faults(model: nn.Module, state: AdapterState) -> list[str]:
    faults = []
    if state.disabled:
        faults.append("the adapters are switched off (inside disable_adapter())")
    if not any(p.requires_grad for p in model.parameters()):
        faults.append("no parameter asks for a gradient: 0 trainable parameters")
    frozen = [name for name in state.active if name not in state.trainable]
    if frozen and not state.trainable & set(state.active):
        faults.append(f"the active adapter {_list(frozen)} is frozen")
    idle = sorted(state.trainable - set(state.active))
    if idle:
        faults.append(f"the trainable adapter {_list(idle)} is not active")
    folded = [name for name in folded_adapters(model) if name in state.trainable]
    if folded:
        faults.append(f"the trainable adapter {_list(folded)} is folded into the base weights")
    meta = [path for path, p in _trainable(model, state) if p.is_meta]
    if meta:
        faults.append(f"{len(meta)} adapter weights are on the meta device, e.g. {meta[0]}")
    return faults


def _cure(state: AdapterState) -> str:
    active = list(state.active)
    idle = sorted(state.trainable - set(active))
    if idle:
        return f"model.set_adapter({[*active, *idle]!r}, train={idle!r})"
    if state.trainable:
        return "model.unmerge_adapter() if it is folded in; leave disable_adapter(); load weights"
    return (
        "PeftModel.from_pretrained(base, path, is_trainable=True), or "
        f"model.set_adapter({active!r}, train={active[-1:]!r})"
    )


def _trainable(model: nn.Module, state: AdapterState) -> list[tuple[str, Any]]:
    live = state.trainable & set(state.active)
    found: list[tuple[str, Any]] = []
    for path, layer in lora_layers(model):
        for name in live & layer.records.keys():
            found += [(f"{path}.{leaf}", p) for leaf, p in layer.tensors(name).items()]
    for path, wrapper in saved_modules(model):
        for name in live & set(wrapper.modules_to_save):
            module = wrapper.modules_to_save[name]
            found += [(f"{path}.{leaf}", p) for leaf, p in module.named_parameters()]
    return found


def _fixed_A(path: str, parameter: nn.Parameter) -> bool:
    # LoRA-FA trains B alone.
    return not parameter.requires_grad and path.endswith((".lora_A.weight", ".lora_embedding_A"))


def check_gradients(model: nn.Module) -> None:
    """After the first backward: every factor of a trainable adapter got a finite gradient.

    Raises:
        PreflightError: some got none (cut off, for instance by checkpointing), or NaN or Inf.
    """
    state = find_state(model)
    if state is None:
        raise PreflightError("The model has no adapters.")
    without, broken = [], []
    for path, parameter in _trainable(model, state):
        if _fixed_A(path, parameter):
            continue
        if parameter.grad is None:
            without.append(path)
        elif not bool(torch.isfinite(parameter.grad).all()):
            broken.append(path)
    faults = [f"no gradient: {path}" for path in without[:_SHOWN]]
    faults += [f"NaN or Inf in the gradient: {path}" for path in broken[:_SHOWN]]
    if faults:
        raise PreflightError(
            f"{len(without)} adapter weights got no gradient, {len(broken)} a broken one.",
            faults=faults,
            cure="with activation checkpointing call model.enable_input_require_grads(), or use "
            "use_reentrant=False; for NaN lower the learning rate or train in bf16",
        )


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names))
