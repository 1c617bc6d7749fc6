"""Names in a model and names on disk: one to one, whatever wraps the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lamina.checkpoint.keys import (
    disk_key,
    is_double,
    map_keys,
    respelt_bias,
    slots,
    suggest_mapping,
)
from lamina.checkpoint.origin import plain_key
from lamina.config import LoraConfig
from lamina.model import PeftModel, get_peft_model
from tests import models

PREFIX = "base_model.model."


def adapted(build: Any, *, name: str = "default", **config: Any) -> PeftModel:
    return get_peft_model(build(), LoraConfig(r=4, **config), adapter_name=name)


MODELS: dict[str, Any] = {
    "llama": lambda name: adapted(
        models.tiny_llama,
        name=name,
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
    ),
    "gpt2": lambda name: adapted(
        models.tiny_gpt2, name=name, target_modules=["c_attn"], bias="all", lora_bias=True
    ),
    "bert": lambda name: adapted(
        models.tiny_bert_classifier,
        name=name,
        target_modules=["query", "dense"],
        modules_to_save=["classifier", "pooler"],
        bias="lora_only",
    ),
    "conv": lambda name: adapted(
        lambda: models.convolution_net(2), name=name, target_modules=["stem", "grouped"]
    ),
    "perceptron": lambda name: adapted(models.perceptron, name=name, target_modules=["up", "down"]),
}


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["default", "sft", "lora_A", "weight", "modules_to_save"])
def test_every_trained_tensor_has_one_name_on_disk(kind: str, name: str) -> None:
    model = MODELS[kind](name)
    found = slots(model, name, model.adapter_state)
    # One slot for each tensor, and one tensor for each slot.
    pointers = {slot.tensor.data_ptr(): key for key, slot in found.items()}
    assert len(pointers) == len(found)
    trained = {p.data_ptr() for p in trained_tensors(model).values()}
    assert trained == set(pointers)
    # The name in the state dict leads to the same name.
    state = model.state_dict(keep_vars=True)
    by_disk = {disk_key(key, name): tensor for key, tensor in state.items()}
    for key, slot in found.items():
        assert by_disk[key].data_ptr() == slot.tensor.data_ptr()
        assert key == f"{slot.module}.{slot.leaf}"
        assert plain_key(key) == key
        assert key.startswith(PREFIX)
        assert name == "weight" or name not in key.removeprefix(PREFIX).split(".")[:-2]


@pytest.mark.parametrize("kind", MODELS)
def test_the_name_of_the_adapter_leaves_no_trace(kind: str) -> None:
    names = []
    for adapter in ("default", "other"):
        model = MODELS[kind](adapter)
        names.append(list(slots(model, adapter, model.adapter_state)))
    assert names[0] == names[1]


@pytest.mark.parametrize("kind", MODELS)
def test_filling_a_slot_changes_that_tensor(kind: str) -> None:
    model = MODELS[kind]("default")
    found = slots(model, "default", model.adapter_state)
    for number, slot in enumerate(found.values()):
        slot.put(torch.full_like(slot.tensor, number))
    after = slots(model, "default", model.adapter_state)
    for number, slot in enumerate(after.values()):
        assert bool((slot.tensor == number).all())
    filled = {int(p.flatten()[0]) for p in trained_tensors(model).values()}
    assert filled == set(range(len(found)))


class Parallel(nn.DataParallel):
    """DataParallel without devices."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def compiled_layers() -> nn.Module:
    model = models.tiny_llama()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)
    return model


def test_wrappers_dont_reach_the_names() -> None:
    expected = list(slots(plain := MODELS["llama"]("default"), "default", plain.adapter_state))
    builds: dict[str, Any] = {
        "compiled": lambda: torch.compile(models.tiny_llama()),
        "compiled layer by layer": compiled_layers,
        "parallel": lambda: Parallel(models.tiny_llama()),
    }
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    for kind, build in builds.items():
        model = adapted(build, **settings)
        found = slots(model, "default", model.adapter_state)
        assert sorted(found) == sorted(expected), kind


def test_two_adapters_have_the_same_names_and_other_tensors() -> None:
    model = MODELS["llama"]("default")
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model.add_adapter("default2", config)
    one, two = (slots(model, name, model.adapter_state) for name in ("default", "default2"))
    assert list(one) == list(two)
    pointers = [{slot.tensor.data_ptr() for slot in found.values()} for found in (one, two)]
    assert pointers[0].isdisjoint(pointers[1])
    owned = {name for name in model.state_dict() if disk_key(name, "default2") in two}
    assert not any(".default." in name for name in owned if disk_key(name, "default2") != name)


def test_alone_a_bias_is_spelt_without_the_other_adapters_layer() -> None:
    model = MODELS["gpt2"]("default")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["c_fc"]))
    key = f"{PREFIX}transformer.h.0.mlp.c_fc"
    together = slots(model, "default", model.adapter_state)
    alone = slots(model, "default", model.adapter_state, alone=True)
    assert f"{key}.base_layer.bias" in together
    assert f"{key}.bias" in alone
    assert respelt_bias(f"{key}.bias", together) == f"{key}.base_layer.bias"
    assert respelt_bias(f"{key}.base_layer.bias", alone) == f"{key}.bias"
    assert respelt_bias(f"{key}.bias", alone) == f"{key}.bias"


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("module.a.lora_A.weight", "a.lora_A.weight"),
        ("_orig_mod.a.lora_A.weight", "a.lora_A.weight"),
        ("base_model.model._orig_mod.a.lora_A.weight", "base_model.model.a.lora_A.weight"),
        ("a._fsdp_wrapped_module.b.lora_B.bias", "a.b.lora_B.bias"),
        ("a._checkpoint_wrapped_module.b._orig_mod.c.weight", "a.b.c.weight"),
        ("a.lora_A.default.weight", "a.lora_A.weight"),
        ("a.lora_B.sft.bias", "a.lora_B.bias"),
        ("a.lora_embedding_A.sft", "a.lora_embedding_A"),
        # Names that only look like it stay.
        ("a.module.b.weight", "a.module.b.weight"),
        ("a.my_orig_mod.weight", "a.my_orig_mod.weight"),
        ("a.lora_A.weight", "a.lora_A.weight"),
        ("a.lora_embedding_B", "a.lora_embedding_B"),
    ],
)
def test_plain_names(wrapped: str, plain: str) -> None:
    assert plain_key(wrapped) == plain
    assert plain_key(plain) == plain


@pytest.mark.parametrize(
    ("key", "on_disk"),
    [
        ("a.lora_A.sft.weight", "a.lora_A.weight"),
        ("a.lora_embedding_B.sft", "a.lora_embedding_B"),
        ("a.modules_to_save.sft.weight", "a.weight"),
        ("a.modules_to_save.sft.dense.bias", "a.dense.bias"),
        ("_orig_mod.a.lora_B.sft.weight", "a.lora_B.weight"),
        ("a.lora_A.sft2.weight", None),
        ("a.base_layer.weight", None),
        ("a.sft.weight", None),
        ("a.bias", "a.bias"),
    ],
)
def test_names_of_a_state_dict(key: str, on_disk: str | None) -> None:
    assert disk_key(key, "sft") == on_disk


def test_doubles_of_biases() -> None:
    keys = {
        "head.bias",
        "head.modules_to_save.bias",
        "head.original_module.bias",
        "pooler.dense.bias",
        "pooler.original_module.dense.bias",
        "other.original_module.bias",
    }
    assert {key for key in keys if is_double(key, keys)} == {
        "head.modules_to_save.bias",
        "head.original_module.bias",
        "pooler.original_module.dense.bias",
    }


def test_a_mapping_is_applied_once_by_the_first_pattern_that_changes_a_name() -> None:
    mapping = {r"^model\.": "language.", r"^language\.": "never.", "q_proj": "query"}
    keys = ["model.q_proj", "language.a", "other.q_proj", "rest"]
    assert map_keys(keys, mapping) == {
        "model.q_proj": "language.q_proj",
        "language.a": "never.a",
        "other.q_proj": "other.query",
        "rest": "rest",
    }
    assert map_keys(keys, {}) == {key: key for key in keys}


PARTS = st.lists(st.sampled_from(["model", "layers", "0", "1", "self_attn", "text"]), max_size=3)


@given(PARTS, PARTS)
def test_the_mapping_that_is_suggested_fits(theirs: list[str], ours: list[str]) -> None:
    names = [f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("q.lora_A.weight", "k.lora_B.bias")]
    file = [".".join([*theirs, name]) for name in names]
    model = [".".join([*ours, name]) for name in names]
    mapping = suggest_mapping(file, model)
    assert (mapping == {}) == (file == model)
    assert sorted(map_keys(file, mapping).values()) == sorted(model)


def test_nothing_is_suggested_for_names_that_have_only_factors_in_common() -> None:
    assert suggest_mapping(["a.x.lora_A.weight"], ["b.y.lora_A.weight"]) == {}
