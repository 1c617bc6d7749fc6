"""peft's functions for devices and bitsandbytes' weights, and the classes of quantisers."""

from __future__ import annotations

from types import SimpleNamespace

import peft.tuners.lora.bnb as real_bnb
import pytest
import torch
from peft.utils import integrations as real
from torch import nn
from transformers import DynamicCache

from lamina.interop.peft import integrations as ours
from lamina.interop.peft import kinds, layers
from lamina.interop.peft.adapting import get_peft_model
from lamina.interop.peft.lora_config import LoraConfig

bnb = pytest.importorskip("bitsandbytes")


def model_on(layers, **placed):
    return SimpleNamespace(
        hf_device_map={name.replace("_", "."): on for name, on in placed.items()},
        config=SimpleNamespace(num_hidden_layers=layers),
    )


def test_layers_run_where_they_lie_and_offloaded_ones_on_the_first_device():
    model = model_on(3, model_embed=0, model_layers_0=0, model_layers_1=1, model_layers_2="cpu")

    found = ours.get_layer_device_map(model)

    assert found == {0: 0, 1: 1, 2: 0} == real.get_layer_device_map(model)
    whole = SimpleNamespace(hf_device_map={"": 1}, config=model.config)
    assert (
        ours.get_layer_device_map(whole) == real.get_layer_device_map(whole) == {0: 1, 1: 1, 2: 1}
    )


def test_a_layer_that_lies_nowhere_is_named():
    model = model_on(2, model_layers_0=0)
    for functions in (real, ours):
        with pytest.raises(RuntimeError, match="layer 1 has not been mapped to a device"):
            functions.get_layer_device_map(model)


def test_a_cache_follows_its_layers():
    model = model_on(2, model_layers_0="meta", model_layers_1="meta")
    cache = DynamicCache()
    for index in range(2):
        cache.update(torch.rand(1, 1, 2, 3), torch.rand(1, 1, 2, 3), index)

    ours.map_cache_to_layer_device_map(model, cache)

    assert {layer.keys.device.type for layer in cache.layers} == {"meta"}
    assert {layer.values.device.type for layer in cache.layers} == {"meta"}


def test_8bit_weights_are_read_by_their_rows_scales():
    codes = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    state = SimpleNamespace(SCB=torch.rand(4))
    weight = nn.Parameter(codes, requires_grad=False)

    read = ours.dequantize_bnb_weight(weight, state)

    torch.testing.assert_close(read, codes * state.SCB[:, None] / 127)
    with pytest.raises(ValueError, match="without its `state`"):
        ours.dequantize_bnb_weight(weight)


def test_4bit_weights_are_read_as_peft_reads_them():
    layer = bnb.nn.Linear4bit(64, 64, bias=False)
    layer.weight = bnb.nn.Params4bit(torch.rand(64, 64), requires_grad=False)
    layer = layer.to("cpu")

    read = ours.dequantize_bnb_weight(layer.weight)

    assert torch.equal(read, real.dequantize_bnb_weight(layer.weight))
    assert read.std() > 0


def test_quantised_layers_are_told_by_their_base_and_can_be_derived_from():
    class Own(layers.Linear4bit):
        pass

    base = nn.ModuleDict({"four": bnb.nn.Linear4bit(64, 64), "plain": nn.Linear(64, 64)})
    model = get_peft_model(base, LoraConfig(target_modules=["four", "plain"])).base_model.model

    assert isinstance(model["four"], layers.Linear4bit)
    assert not isinstance(model["four"], layers.Linear8bitLt)
    assert not isinstance(model["four"], Own)
    assert not isinstance(model["plain"], layers.Linear4bit)
    assert issubclass(layers.Linear4bit, kinds.LoraLayer)
    assert issubclass(real_bnb.Linear4bit, real_bnb.LoraLayer)
    built = Own(bnb.nn.Linear4bit(64, 64), "default", LoraConfig(), r=2, lora_alpha=2)
    assert isinstance(built, Own)
    assert isinstance(built, layers.Linear4bit)
