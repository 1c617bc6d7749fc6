"""The same model under the same adapter twice: with Lamina and with the real peft."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lamina
from tests import models
from tests.engine.adapters import adapted_names

BASE = "base_model.model."


def pair(
    make: Callable[[], nn.Module], seed: int = 1, **config: Any
) -> tuple[nn.Module, nn.Module]:
    """(ours, theirs) with the same random numbers in all that is trained."""
    ours = lamina.get_peft_model(make(), lamina.LoraConfig(**config))
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**config))
    fill(ours, theirs, seed)
    return ours.eval(), theirs.eval()


def add(ours: nn.Module, theirs: nn.Module, name: str, seed: int = 2, **config: Any) -> None:
    """Give both a second adapter and let it contribute after those that are active."""
    ours.add_adapter(name, lamina.LoraConfig(**config))
    theirs.add_adapter(name, peft.LoraConfig(**config))
    active = [*theirs.active_adapters, name]
    ours.set_adapter(active)
    theirs.base_model.set_adapter(active)
    fill(ours, theirs, seed)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that ask for gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill(ours: nn.Module, theirs: nn.Module, seed: int) -> None:
    """The same random numbers into what both train, which has to be the same by name."""
    mine, other = trained(ours), trained(theirs)
    assert mine.keys() == other.keys()
    with models.seeded(seed):
        for name, parameter in sorted(other.items()):
            parameter.normal_(std=0.3)
            mine[name].copy_(parameter)


def answer(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, or whatever tensor the model gives."""
    result = model(x)
    return getattr(result, "logits", result)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of all that is trained, for a fixed weighing of the outputs."""
    model.zero_grad()
    result = answer(model, x)
    with models.seeded(11):
        weigh = torch.randn(result.shape)
    (result * weigh).sum().backward()
    found = {name: p.grad for name, p in trained(model).items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_close(first: Tensor, second: Tensor, relative: float = 1e-6) -> None:
    """Equal up to `relative` times the largest number."""
    assert first.shape == second.shape
    assert first.dtype == second.dtype
    error = (first - second).abs().max()
    assert error <= relative * second.abs().max(), f"relative error {error / second.abs().max()}"


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model after the active adapters are merged in."""
    with warnings.catch_warnings():
        # peft warns of tied weights and goes on.
        warnings.simplefilter("ignore")
        return dict(model.merge_and_unload().state_dict())


def targets_of_peft(model: nn.Module) -> set[str]:
    """Plain names of the layers that peft has adapted."""
    layer = peft.tuners.lora.LoraLayer
    return {
        name.removeprefix(BASE)
        for name, module in model.named_modules()
        if isinstance(module, layer)
    }


def targets_of_lamina(model: nn.Module) -> set[str]:
    """Plain names of the layers that Lamina has adapted."""
    return {name.removeprefix(BASE) for name in adapted_names(model)}
