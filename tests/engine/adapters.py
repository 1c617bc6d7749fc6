"""Adapters with random factors on tiny models, as the tests of the engine need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.inject import find_state, inject
from lamina.engine.layers import LoraLayer, lora_layers
from lamina.engine.state import AdapterState
from lamina.engine.trainability import adapter_parameters, apply_trainability
from tests import models


def adapt(
    model: nn.Module,
    name: str = "default",
    *,
    seed: int | None = 1,
    active: bool = True,
    trainable: bool = True,
    strict: bool = True,
    **config: Any,
) -> AdapterState:
    """Add an adapter and let it contribute after those that are active already.

    Args:
        model: any module, adapted or not.
        name: the adapter's name.
        seed: fills all its tensors with random numbers; None leaves them as they begin.
        active: False leaves it inactive.
        trainable: whether it is declared trainable.
        strict: every pattern has to match.
        config: the fields of its `LoraConfig`.
    """
    state = find_state(model) or AdapterState()
    inject(model, name, LoraConfig(**config), state, trainable=trainable, strict=strict)
    if seed is not None:
        randomise(model, name, seed)
    if active:
        state.activate([*state.active, name])
    apply_trainability(model, state)
    return state


@torch.no_grad()
def randomise(model: nn.Module, name: str, seed: int, size: float = 0.3) -> None:
    """Fill an adapter's factors with normal numbers of standard deviation `size`."""
    with models.seeded(seed):
        for owner, parameter in adapter_parameters(model):
            if owner == name:
                parameter.normal_(std=size)


def layer_of(model: nn.Module, path: str) -> LoraLayer:
    """The adapted layer of that name."""
    return dict(lora_layers(model))[path]


def adapted_names(model: nn.Module) -> set[str]:
    """Where the adapted layers are."""
    return {path for path, _ in lora_layers(model)}


def assert_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """The same names and, bit for bit, the same numbers in the same dtypes."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
