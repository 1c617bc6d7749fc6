"""LoRA-GA's pass over data: the gradient of each targeted weight.

Source: arXiv:2407.05000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.init.loraga import ATTRIBUTE
from lamina.engine.preparing import cache
from lamina.engine.preparing.linear import Target, linear_targets
from lamina.engine.weights import DenseWeight, weight_of
from lamina.errors import InitialisationError


@torch.no_grad()
def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], object],
    cache_file: str | Path | None = None,
) -> None:
    """Leave on each targeted linear layer the gradient of its weight, averaged over its calls.

    Args:
        model: the model, before it is adapted.
        lora_config: with `lora_ga_config`.
        train_step: runs forward and backward passes, as many as the average shall be over.
        cache_file: read the gradients from there, or if it isn't there yet, write them.

    Raises:
        InitialisationError: with everything that is wrong; nothing is left on the model.
    """
    if lora_config.lora_ga_config is None:
        raise InitialisationError(
            "If you want to use LoRA-GA, give the config its settings.",
            cure="LoraConfig(init_lora_weights='lora_ga', lora_ga_config=LoraGAConfig())",
        )
    targets = linear_targets(model, lora_config)
    _check(targets)
    names = {target.name: f"{target.name}.{ATTRIBUTE}" for target in targets}
    if cache_file is not None and cache.is_there(cache_file):
        held = cache.read(cache_file, names.values(), targets[0].module.weight.device)
        gradients = {target.name: held[names[target.name]] for target in targets}
    else:
        gradients = _gradients(model, targets, train_step)
        if cache_file is not None:
            cache.write(cache_file, {names[name]: grad for name, grad in gradients.items()})
    for target in targets:
        setattr(target.module, ATTRIBUTE, gradients[target.name])


def _check(targets: list[Target]) -> None:
    if not targets:
        raise InitialisationError(
            "No supported layers found for LoRA-GA initialization: it is made for linear layers.",
            cure="name linear layers in target_modules",
        )
    faults = [
        f"{target.name} ({type(target.module).__name__}) is quantized"
        for target in targets
        if hasattr(target.module, "quant_state")
        or not isinstance(weight_of(target.module), DenseWeight)
    ]
    if faults:
        raise InitialisationError(
            "LoRA-GA does not support quantized models: it needs full gradients.",
            faults=faults[:8],
            cure="load the base in bf16 or fp32",
        )


def _gradients(
    model: nn.Module, targets: list[Target], train_step: Callable[[], object]
) -> dict[str, torch.Tensor]:
    with _only_these_train(model, targets), _counted(targets) as counts:
        with torch.enable_grad():
            train_step()
        grads = {target.name: target.module.weight.grad for target in targets}
    faults = [
        f"{name}: no gradient reached it while train_step ran"
        for name, grad in grads.items()
        if grad is None or not counts[name]
    ]
    faults += [
        f"{name}: its gradient has NaN or Inf in it"
        for name, grad in grads.items()
        if grad is not None and not bool(torch.isfinite(grad).all())
    ]
    if faults:
        raise InitialisationError(
            f"LoRA-GA can't begin {len(faults)} of {len(targets)} layers.",
            faults=faults[:8],
            cure="let train_step call loss.backward() without zeroing gradients afterwards, and "
            "leave layers that the loss doesn't depend on out of target_modules",
        )
    return {name: grad.detach() / counts[name] for name, grad in grads.items()}


@contextmanager
def _only_these_train(model: nn.Module, targets: list[Target]) -> Iterator[None]:
    """Ask gradients for the targets' weights alone; afterwards everything is as before."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    before = {target.name: target.module.weight.grad for target in targets}
    for parameter, _ in asked:
        parameter.requires_grad_(False)
    for target in targets:
        target.module.weight.grad = None
        target.module.weight.requires_grad_(True)
    model.train()
    try:
        yield
    finally:
        for parameter, was in asked:
            parameter.requires_grad_(was)
        for target in targets:
            target.module.weight.grad = before[target.name]
        for module, mode in training:
            module.training = mode


@contextmanager
def _counted(targets: list[Target]) -> Iterator[dict[str, int]]:
    """How often a gradient came back to each layer's output."""
    counts = {target.name: 0 for target in targets}

    def watch(name: str) -> Callable[..., None]:
        def count(_: object) -> None:
            counts[name] += 1

        def hook(module: nn.Module, args: object, output: Any) -> None:
            if output.requires_grad:
                output.register_hook(count)

        return hook

    handles = [target.module.register_forward_hook(watch(target.name)) for target in targets]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
