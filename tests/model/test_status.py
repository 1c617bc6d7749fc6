from __future__ import annotations

import pytest

from lamina.config import LoraConfig
from lamina.errors import AdapterNameError
from lamina.model import (
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from tests import models
from tests.adapters import fill, llama_adapter, llama_config


def test_a_status_for_every_layer() -> None:
    model = llama_adapter()
    model.add_adapter("two", llama_config(target_modules=["v_proj"]))
    statuses = get_layer_status(model)
    assert [status.name for status in statuses] == [
        f"model.layers.{i}.self_attn.{proj}" for i in (0, 1) for proj in ("q_proj", "v_proj")
    ]
    query, value = statuses[:2]
    assert query.module_type == "lora.Linear"
    assert query.available_adapters == ["default"]
    assert value.available_adapters == ["default", "two"]
    assert value.active_adapters == ["default"]
    assert value.requires_grad == {"default": True, "two": False}
    assert value.merged_adapters == []
    assert value.devices == {"default": ["cpu"], "two": ["cpu"]}
    assert model.get_layer_status() == statuses


def test_the_status_of_the_whole() -> None:
    model = llama_adapter()
    status = get_model_status(model)
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == "LoraModel"
    assert status.peft_types == {"default": "LORA"}
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.num_adapter_layers == 4
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True}
    assert status.available_adapters == ["default"]
    assert status.devices == {"default": ["cpu"]}
    assert model.get_model_status() == status


def test_it_follows_what_happens() -> None:
    model = llama_adapter()
    model.add_adapter("two", llama_config(target_modules=["v_proj"]))
    fill(model, "two")
    model.set_adapter(["default", "two"], train=["two"])
    status = get_model_status(model)
    assert status.active_adapters == ["default", "two"]
    assert status.requires_grad == {"default": False, "two": True}
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
        assert not any(layer.enabled for layer in get_layer_status(model))
    model.merge_adapter(["default"])
    assert get_model_status(model).merged_adapters == ["default"]
    model.merge_adapter(["two"])
    # Where "two" is, both are folded in; elsewhere only "default" could be.
    assert get_model_status(model).merged_adapters == "irregular"
    model.unmerge_adapter()
    assert get_model_status(model).merged_adapters == []


def test_what_differs_is_irregular() -> None:
    model = llama_adapter()
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.lora_A["default"].weight.requires_grad_(False)
    assert [s.requires_grad["default"] for s in get_layer_status(model)] == [
        True,
        True,
        "irregular",
        True,
    ]
    assert get_model_status(model).requires_grad == {"default": "irregular"}


def test_models_without_a_facade_have_a_status() -> None:
    base = models.perceptron()
    inject_adapter_in_model(LoraConfig(target_modules=["up"]), base)
    status = get_model_status(base)
    assert status.base_model_type == "Perceptron"
    assert status.adapter_model_type == "None"
    assert [layer.name for layer in get_layer_status(base)] == ["up"]


def test_models_without_adapters_have_none() -> None:
    with pytest.raises(AdapterNameError, match="no adapters"):
        get_model_status(models.perceptron())
    model = get_peft_model(models.perceptron(), LoraConfig(target_modules=["up"]))
    with pytest.raises(AdapterNameError, match="no adapters"):
        get_layer_status(model.unload())
