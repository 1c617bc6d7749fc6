"""Weights that hooks bring into place before a module's forward, and inputs left as they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina.engine.layers import lora_layers
from tests import models
from tests.adapters import fill

CASES = {
    "linear": (models.perceptron, ["up", "down"], torch.linspace(-1, 1, 32).reshape(2, 16)),
    "conv": (
        lambda: models.convolution_net(2),
        ["stem", "pointwise"],
        torch.linspace(-2, 2, 2 * 3 * 64).sin().reshape(2, 3, 8, 8),
    ),
}


def adapted(case: str) -> lamina.PeftModel:
    make, targets, _ = CASES[case]
    model = lamina.get_peft_model(make(), lamina.LoraConfig(r=4, target_modules=targets))
    fill(model)
    return model.eval()


def store_in_half(model: nn.Module) -> None:
    """Every weight in bf16, and in fp32 while its own module runs, as layerwise casting does."""

    def to(dtype: torch.dtype) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)

        return hook

    model.bfloat16()
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(to(torch.float32))
            module.register_forward_hook(to(torch.bfloat16))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_hooks_of_a_factor_run_and_inputs_stay_as_they_are(case: str) -> None:
    x = CASES[case][2]
    expected_of = adapted(case).bfloat16().float()
    model = adapted(case)
    store_in_half(model)
    for _, layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False
    torch.testing.assert_close(model(x), expected_of(x))
    a, b = next(layer for _, layer in lora_layers(model)).factors("default")
    assert a.dtype == b.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_by_default_an_input_is_cast_to_the_stored_dtype(case: str) -> None:
    # The hook has widened the weight in the meantime: peft fails here too.
    model = adapted(case)
    store_in_half(model)
    with pytest.raises(RuntimeError, match="type"):
        model(CASES[case][2])
