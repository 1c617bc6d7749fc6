"""A few steps of training on fixed data, and the weights that come out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lamina
from tests import models


def perceptron(r: int = 4, seed: int = 3, **config: Any) -> lamina.PeftModel:
    """A perceptron under an adapter whose A and B are both full of numbers, in training."""
    settings: dict[str, Any] = {"target_modules": ["up", "down"], "r": r, "lora_alpha": 6}
    model = lamina.get_peft_model(models.perceptron(), lamina.LoraConfig(**settings | config))
    fill(model, seed)
    return model


@torch.no_grad()
def fill(model: nn.Module, seed: int = 3) -> None:
    """Seeded numbers into all that asks for gradients."""
    with models.seeded(seed):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def inputs(step: int = 0) -> Tensor:
    """What a perceptron takes: 8 x 16."""
    return torch.linspace(-2, 2, 8 * 16).add(step).mul(3).sin().reshape(8, 16)


def loss(model: nn.Module, x: Tensor, step: int = 0) -> Tensor:
    """The distance from fixed numbers, which differ from step to step."""
    result = model(x)
    result = getattr(result, "logits", result).float()
    goal = torch.linspace(-1, 1, result.numel()).add(step).cos().reshape(result.shape)
    return (result - goal).square().mean()


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 4,
    x: Tensor | None = None,
    first: int = 0,
) -> None:
    """Steps number `first`, `first + 1`, ..."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(model, inputs(step) if x is None else x, step).backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """The parameters that have changed."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
