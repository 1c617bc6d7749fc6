"""Adapters that the real peft wrote, as parents in all modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from lamina.config import LoraConfig
from lamina.errors import StageError
from lamina.model import PeftModel
from lamina.stages import begin_stage, lineage, load, save_stage
from tests import models
from tests.stages.chains import (
    WEIGHTS,
    answer,
    distance,
    fill_trainable,
    open_with_peft,
    requires_grad,
    save_plain_peft,
    tensors_of,
)

BERT = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"}
GPT2 = {"r": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
CASES: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "heads": (models.tiny_bert_classifier, BERT, ["value", "query"]),
    "heads and all biases": (models.tiny_bert_classifier, BERT | {"bias": "all"}, ["value"]),
    "some biases": (models.tiny_gpt2, GPT2 | {"bias": "lora_only"}, ["c_fc", "c_attn"]),
    "all biases": (models.tiny_gpt2, GPT2 | {"bias": "all"}, ["c_fc"]),
    "biases of B": (models.tiny_gpt2, GPT2 | {"lora_bias": True}, ["c_attn", "c_fc"]),
}


@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_modules_that_peft_takes_by_the_end_of_their_names(mode: str, tmp_path: Path) -> None:
    # To peft, "norm" is the end of "input_layernorm" too: it has trained and saved five modules.
    settings = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    expected = save_plain_peft(tmp_path / "plain", settings)
    assert len(lineage(tmp_path / "plain").saved_modules) == 5
    config = None if mode == "continue" else LoraConfig(r=3, target_modules=["v_proj"])
    model = begin_stage(
        models.tiny_llama(), name="next", parent=tmp_path / "plain", mode=mode, config=config
    )
    assert distance(answer(model), expected) < 1e-5
    save_stage(model, tmp_path / "next")
    assert distance(answer(open_with_peft(tmp_path / "next")), expected) < 1e-5


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_a_stage_on_a_plain_adapter(kind: str, mode: str, tmp_path: Path) -> None:
    build, settings, targets = CASES[kind]
    expected = save_plain_peft(tmp_path / "plain", settings, build)
    assert distance(answer(load(tmp_path / "plain", build())), expected) < 1e-6
    config = None
    if mode != "continue":
        config = LoraConfig(r=3, target_modules=targets, task_type=settings["task_type"])
    model = begin_stage(
        build(), name="next", parent=tmp_path / "plain", mode=mode, config=config
    ).eval()
    assert distance(answer(model), expected) < 2e-6
    fill_trainable(model)
    save_stage(model, tmp_path / "next")
    for opened in (load(tmp_path / "next", build()), open_with_peft(tmp_path / "next", build)):
        assert distance(answer(opened), answer(model)) < 1e-5
    # And once more, from the laminated file.
    again = begin_stage(build(), name="more", parent=tmp_path / "next", mode="continue").eval()
    assert distance(answer(again), answer(model)) < 1e-5
    assert [stage.name for stage in lineage(tmp_path / "next").stages] == ["imported", "next"]


def test_the_biases_of_a_plain_adapter_train_on_only_in_continue(tmp_path: Path) -> None:
    build, settings, _ = CASES["some biases"]
    save_plain_peft(tmp_path / "plain", settings, build)
    call: dict[str, Any] = {"name": "next", "parent": tmp_path / "plain"}
    model = begin_stage(build(), mode="continue", **call)
    assert sum(name.endswith("c_attn.base_layer.bias") for name in requires_grad(model)) == 2
    config = LoraConfig(r=2, target_modules=["c_attn"])
    model = begin_stage(build(), mode="stack", config=config, **call)
    assert not any(name.endswith("bias") for name in requires_grad(model))


def test_names_with_wrappers_in_them(tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    expected = save_plain_peft(tmp_path / "plain", settings)
    tensors = {}
    for key, tensor in tensors_of(tmp_path / "plain").items():
        wrapped = key.replace("base_model.model.", "base_model.model._orig_mod.")
        wrapped = wrapped.replace("lora_A.weight", "lora_A.default.weight")
        tensors[wrapped.replace("lora_B.weight", "lora_B.default.weight")] = tensor
    save_file(tensors, tmp_path / "plain" / WEIGHTS)
    assert set(lineage(tmp_path / "plain").laminae[0].ranks) == {
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    model = begin_stage(
        models.tiny_llama(), name="next", parent=tmp_path / "plain", mode="continue"
    )
    assert distance(answer(model), expected) < 1e-6


def test_a_vocabulary_is_not_taken_from_a_plain_adapter(tmp_path: Path) -> None:
    # Peft stores an adapted embedding whole; what counts is the base at hand.
    save_plain_peft(tmp_path / "plain", {"r": 4, "target_modules": ["embed_tokens"]})
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in tensors_of(tmp_path / "plain")
    model = begin_stage(
        models.tiny_llama(), name="next", parent=tmp_path / "plain", mode="continue"
    )
    save_stage(model, tmp_path / "next")
    assert key not in tensors_of(tmp_path / "next")
    weight = model.get_base_model().model.embed_tokens.base_layer.weight
    assert torch.equal(weight, models.tiny_llama().model.embed_tokens.weight)


def test_an_embedding_that_was_resized_has_to_be_the_bases(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        models.tiny_llama(),
        peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
    ).eval()
    with torch.no_grad():
        theirs.get_base_model().model.embed_tokens.base_layer.weight.mul_(1.5)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    config = LoraConfig(r=3, target_modules=["v_proj"])
    how: dict[str, Any] = {"name": "n", "parent": tmp_path, "mode": "stack", "config": config}
    base = models.tiny_llama()
    with pytest.raises(StageError, match="weight in the parent's file"):
        begin_stage(base, **how)
    base = PeftModel.from_pretrained(base, tmp_path).unload()
    assert distance(answer(begin_stage(base, **how)), answer(theirs)) < 1e-5
