"""Adapter directories pass between Lamina and the real peft without a change in the logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import lamina
from lamina.config import LoraConfig
from lamina.model import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tests import models
from tests.adapters import WEIGHTS, fill, trained

# What peft warns of is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@dataclass(frozen=True)
class Case:
    """A base and the settings of an adapter over it."""

    base: Callable[[], nn.Module]
    settings: dict[str, Any]
    probe: Callable[[], dict[str, Any]] = field(default=lambda: {"input_ids": models.token_ids()})
    inputs: tuple[int, ...] | None = None

    def ours(self) -> LoraConfig:
        return LoraConfig(**self.settings)

    def theirs(self) -> peft.LoraConfig:
        return peft.LoraConfig(**self.settings)

    @torch.no_grad()
    def answer(self, model: nn.Module) -> Tensor:
        model.eval()
        if self.inputs is not None:
            x = torch.randn(self.inputs, generator=torch.Generator().manual_seed(3))
            return model(x)
        return model(**self.probe()).logits


def llama(**settings: Any) -> Case:
    defaults = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r": 4}
    return Case(models.tiny_llama, defaults | settings)


def bert(**settings: Any) -> Case:
    defaults = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "r": 4}
    return Case(models.tiny_bert_classifier, defaults | settings)


CASES = {
    "all-linear": llama(target_modules="all-linear"),
    "usual-targets": llama(target_modules=None),
    "regex": llama(target_modules=r".*\.1\.mlp\.(up|down)_proj"),
    "excluded": llama(exclude_modules=["layers.0.self_attn.q_proj"]),
    "one-layer": llama(layers_to_transform=[1]),
    "patterns": llama(
        target_modules=["q_proj", "v_proj", "o_proj"],
        rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 7},
        alpha_pattern={"o_proj": 3, "layers.0.self_attn.q_proj": 16},
    ),
    "rslora": llama(use_rslora=True, lora_alpha=12),
    "lora-bias": bert(lora_bias=True),
    "head-saved": llama(modules_to_save=["lm_head"]),
    "conv1d": Case(
        models.tiny_gpt2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
    ),
    "conv1d-all-linear": Case(
        models.tiny_gpt2,
        {"target_modules": "all-linear", "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
    ),
    "classifier": bert(),
    "bias-all": bert(bias="all"),
    "bias-lora-only": bert(bias="lora_only"),
    "embedding": llama(target_modules=["embed_tokens", "q_proj"]),
    "embedding-by-regex": llama(target_modules=r".*(embed_tokens|q_proj)"),
    "conv-1d": Case(
        lambda: models.convolution_net(1),
        {"target_modules": ["stem", "strided", "pointwise"]},
        inputs=(2, 3, 12),
    ),
    "conv-2d": Case(
        lambda: models.convolution_net(2),
        # Not the dilated one: peft's own forward fails there.
        {"target_modules": ["stem", "strided", "pointwise"], "r": 4},
        inputs=(2, 3, 8, 8),
    ),
    "conv-3d": Case(
        lambda: models.convolution_net(3),
        {"target_modules": ["stem", "strided"]},
        inputs=(2, 3, 8, 8, 8),
    ),
    "bf16": Case(
        lambda: models.tiny_llama().bfloat16(),
        {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"},
    ),
    "plain-module": Case(
        models.perceptron, {"target_modules": ["up", "down"], "lora_alpha": 3}, inputs=(5, 16)
    ),
}


def fill_theirs(model: peft.PeftModel, adapter: str = "default") -> None:
    """Random values for all that peft would train of an adapter."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in sorted(model.named_parameters()):
        parts = name.split(".")
        if adapter in parts or (parameter.requires_grad and parts[-1] == "bias"):
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(noise)


def check(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    """The same logits, and not merely the base's; one unit of bf16 where that is the dtype."""
    assert ours.dtype == theirs.dtype
    assert not torch.allclose(theirs, base, atol=1e-3)
    tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_peft_opens_what_lamina_wrote(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    ours = get_peft_model(case.base(), case.ours())
    fill(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.base(), tmp_path)
    check(case.answer(ours), case.answer(theirs), case.answer(case.base()))


@pytest.mark.parametrize("name", CASES)
def test_lamina_opens_what_peft_wrote(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    theirs = peft.get_peft_model(case.base(), case.theirs())
    fill_theirs(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(case.base(), tmp_path)
    check(case.answer(ours), case.answer(theirs), case.answer(case.base()))


@pytest.mark.parametrize("name", CASES)
def test_the_names_on_disk_are_pefts(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    ours = get_peft_model(case.base(), case.ours())
    theirs = peft.get_peft_model(case.base(), case.theirs())
    # Of an adapted embedding peft also writes the base's weight, which isn't the adapter's.
    expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    # Of a module trained whole, bias="all" makes it write each bias three times.
    doubles = ("modules_to_save.bias", "original_module.bias")
    expected = {key: value for key, value in expected.items() if not key.endswith(doubles)}
    found = get_peft_model_state_dict(ours)
    assert found.keys() == expected.keys()
    assert all(found[key].shape == expected[key].shape for key in found)
    assert all(found[key].dtype == expected[key].dtype for key in found)
    set_peft_model_state_dict(ours, expected)
    ours.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS).keys() == expected.keys()


def test_a_config_says_the_same_in_both(tmp_path: Path) -> None:
    case = CASES["patterns"]
    get_peft_model(case.base(), case.ours()).save_pretrained(tmp_path / "ours")
    peft.get_peft_model(case.base(), case.theirs()).save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("ours", "theirs")
    )
    for values in (ours, theirs):
        values["target_modules"] = sorted(values["target_modules"])
        values["base_model_name_or_path"] = values["base_model_name_or_path"] or None
        del values["peft_version"]
    assert ours == theirs


def test_an_embedding_that_was_resized_comes_from_the_file(tmp_path: Path) -> None:
    case = CASES["embedding"]
    theirs = peft.get_peft_model(case.base(), case.theirs())
    fill_theirs(theirs)
    base_weight = theirs.get_base_model().model.embed_tokens.base_layer.weight
    with torch.no_grad():
        base_weight.mul_(1.5)
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    ours = PeftModel.from_pretrained(case.base(), tmp_path)
    check(case.answer(ours), case.answer(theirs), case.answer(case.base()))
    # To a second adapter it is the same base; another base changes under the first one.
    ours.load_adapter(tmp_path, "again")
    other = lamina.get_peft_model(case.base(), case.ours())
    with pytest.warns(UserWarning, match="1 weights of the base replaced"):
        other.load_adapter(tmp_path, "second")


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_with_its_embeddings_trained_whole(tmp_path: Path, tied: bool) -> None:
    def base() -> nn.Module:
        return models.tiny_llama(tie_word_embeddings=tied)

    theirs = peft.get_peft_model(
        base(),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    )
    fill_theirs(theirs)
    # What "auto" comes to where the vocabulary is not that of the base on the hub.
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.lm_head.original_module.weight" in load_file(tmp_path / WEIGHTS)
    ours = PeftModel.from_pretrained(base(), tmp_path)
    ids = models.token_ids()
    check(ours(ids).logits, theirs(ids).logits, base()(ids).logits)


def test_peft_opens_modules_whose_names_are_the_ends_of_others(tmp_path: Path) -> None:
    # To peft, "norm" is the end of "post_attention_layernorm" too.
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    ours = lamina.get_peft_model(models.tiny_llama(), config)
    fill(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    ids = models.token_ids()
    check(ours(ids).logits, theirs(ids).logits, models.tiny_llama()(ids).logits)


def tiny_distilbert() -> DistilBertForSequenceClassification:
    config = DistilBertConfig(
        vocab_size=models.VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=3
    )
    with models.seeded(0):
        return DistilBertForSequenceClassification(config).eval()


def test_a_head_of_two_layers_is_trained_and_saved_as_peft_does(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}
    ours = lamina.get_peft_model(tiny_distilbert(), LoraConfig(**settings))
    theirs = peft.get_peft_model(tiny_distilbert(), peft.LoraConfig(**settings))
    assert trained(ours) == trained(theirs)
    fill(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_distilbert(), tmp_path)
    ids = models.token_ids()
    check(ours(ids).logits, theirs(ids).logits, tiny_distilbert()(ids).logits)


@pytest.mark.parametrize("writer", ["lamina", "peft"])
def test_several_adapters_in_folders(tmp_path: Path, writer: str) -> None:
    case, other = CASES["all-linear"], CASES["rslora"]
    model: Any
    if writer == "lamina":
        model = get_peft_model(case.base(), case.ours())
        model.add_adapter("sft", other.ours())
        fill(model, "default", seed=1)
        fill(model, "sft", seed=2)
    else:
        model = peft.get_peft_model(case.base(), case.theirs())
        model.add_adapter("sft", other.theirs())
        fill_theirs(model, "default")
        fill_theirs(model, "sft")
    model.save_pretrained(tmp_path)
    reader: Any = peft.PeftModel if writer == "lamina" else PeftModel
    loaded = reader.from_pretrained(case.base(), tmp_path)
    loaded.load_adapter(tmp_path / "sft", "sft")
    base = case.answer(case.base())
    for name in ("default", "sft"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        check(case.answer(loaded), case.answer(model), base)
    if writer == "lamina":
        model.set_adapter(["default", "sft"])
        loaded.base_model.set_adapter(["default", "sft"])
    else:
        model.base_model.set_adapter(["default", "sft"])
        loaded.set_adapter(["default", "sft"])
    check(case.answer(loaded), case.answer(model), base)
