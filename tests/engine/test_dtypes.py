from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.dtypes import accumulation_dtype, adapter_dtype, to_adapter_input
from lamina.engine.inject import inject
from lamina.engine.state import AdapterState
from tests import models
from tests.engine.adapters import adapt, layer_of

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("base", "upcast", "expected"),
    [
        (torch.float32, True, torch.float32),
        (torch.float64, True, torch.float64),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, True, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.uint8, True, torch.float32),
        (torch.int8, False, torch.float32),
        (torch.float8_e4m3fn, False, torch.float32),
    ],
)
def test_the_dtype_of_new_adapters(base: torch.dtype, upcast: bool, expected: torch.dtype) -> None:
    assert adapter_dtype(base, upcast=upcast) == expected


def test_sums_are_in_fp32_at_least() -> None:
    assert accumulation_dtype(torch.float64) == torch.float64
    assert {accumulation_dtype(dtype) for dtype in (*HALF, torch.float32)} == {torch.float32}


def factory(kind: str) -> tuple[nn.Module, dict[str, Any], torch.Tensor]:
    if kind == "linear":
        return models.perceptron(), {"target_modules": ["up", "down"]}, torch.randn(2, 16)
    if kind == "embedding":
        return models.embedding_net(), {"target_modules": ["embed"]}, models.token_ids()
    if kind == "conv1d":
        return models.tiny_gpt2(), {"target_modules": ["c_attn"]}, models.token_ids()
    config = {"target_modules": ["stem", "grouped"]}
    return models.convolution_net(2), config, torch.randn(1, 3, 8, 8)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution", "conv1d"])
def test_adapters_are_fp32_over_half_precision_and_outputs_stay_half(
    kind: str, dtype: torch.dtype
) -> None:
    model, config, x = factory(kind)
    model.to(dtype)
    adapt(model, lora_bias=kind == "linear", **config)
    parameters = dict(model.named_parameters())
    assert {p.dtype for n, p in parameters.items() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in parameters.items() if "lora_" not in n} == {dtype}
    x = x.to(dtype) if x.is_floating_point() else x
    result = model(x)
    result = getattr(result, "logits", result)
    assert result.dtype == dtype
    result.float().sum().backward()
    for name, parameter in parameters.items():
        if "lora_" in name:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", HALF)
def test_adapters_may_be_asked_to_be_half(dtype: torch.dtype) -> None:
    model, state = models.perceptron().to(dtype), AdapterState()
    inject(model, "default", LoraConfig(target_modules=["up"]), state, upcast=False)
    state.activate(["default"])
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(2, 16, dtype=dtype)).dtype == dtype


def test_the_update_is_added_in_fp32_and_rounded_once() -> None:
    with models.seeded(0):
        model = nn.Sequential(nn.Linear(16, 24)).to(torch.bfloat16)
    adapt(model, target_modules=["0"])
    layer = layer_of(model, "0")
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    a, b = layer.factors("default")
    exact = layer.base_layer(x).double() + x.double() @ a.double().T @ b.double().T
    half_step = 2.0**-8 * 2 ** exact.abs().log2().floor()
    assert ((model(x).double() - exact).abs() <= half_step * 1.001).all()


def test_the_input_is_cast_but_not_under_autocast() -> None:
    x = torch.randn(2, dtype=torch.bfloat16)
    assert to_adapter_input(x, torch.float32).dtype == torch.float32
    assert to_adapter_input(x, torch.bfloat16) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert to_adapter_input(x, torch.float32) is x


@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution", "conv1d"])
def test_autocast_computes_in_half_and_keeps_the_base_s_output_dtype(kind: str) -> None:
    model, config, x = factory(kind)
    base = model(x)
    adapt(model, **config)
    expected = getattr(model(x), "logits", None)
    expected = model(x) if expected is None else expected
    base = getattr(base, "logits", base)
    plain, _, _ = factory(kind)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x)
        plain_result = plain(x)
    result = getattr(result, "logits", result)
    assert result.dtype == getattr(plain_result, "logits", plain_result).dtype
    error = (result.float() - expected).abs().max() / (expected - base).abs().max()
    assert error < 0.1
    result.float().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32
