"""A dry run says what injecting into the real model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina import LoraConfig, find_all_linear_names, get_peft_model
from lamina.checkpoint.structure import empty_model
from lamina.errors import CheckpointError, TargetError
from lamina.model.dry_run import dry_run
from tests import models


def save_config(model: Any, directory: Path) -> str:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("make", [models.tiny_llama, models.tiny_gpt2, models.tiny_bert_classifier])
def test_says_what_the_real_model_would_get(make: Any, tmp_path: Path) -> None:
    model = make()
    found = dry_run(save_config(model, tmp_path), LoraConfig(r=4, target_modules="all-linear"))
    assert found.model_class == type(model).__name__
    assert found.base_parameters == sum(p.numel() for p in model.parameters())
    assert list(found.linear_names) == find_all_linear_names(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert found.parameters == adapted.get_nb_trainable_parameters()[0]


def test_tells_layers_of_one_name_and_other_shapes_apart(tmp_path: Path) -> None:
    path = save_config(models.tiny_gpt2(), tmp_path)
    found = dry_run(path, LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True))
    assert found.counts == {"c_proj": 4}
    assert {(kind.name, kind.layer, kind.shape, kind.count) for kind in found.kinds} == {
        ("transformer.h.*.attn.c_proj", "Conv1D", "32 → 32", 2),
        ("transformer.h.*.mlp.c_proj", "Conv1D", "128 → 32", 2),
    }


def test_names_the_head_apart(tmp_path: Path) -> None:
    found = dry_run(
        save_config(models.tiny_bert_classifier(), tmp_path),
        LoraConfig(target_modules="all-linear"),
    )
    assert found.head_names == ("classifier",)


def test_no_weight_is_made(tmp_path: Path) -> None:
    # 10^15 parameters would not fit anywhere.
    config = models.tiny_llama().config
    config.update({"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "vocab_size": 1 << 20})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    found = dry_run(str(tmp_path), LoraConfig(r=1, target_modules=["up_proj"]))
    assert found.parameters == 2 * ((1 << 20) + (1 << 22))
    assert {p.device.type for p in empty_model(str(tmp_path)).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [(["NoSuchForCausalLM"], "LlamaForCausalLM"), (["NoSuch"], "LlamaModel"), ([], "LlamaModel")],
)
def test_a_class_that_is_not_known_falls_back(
    tmp_path: Path, architectures: list[str], expected: str
) -> None:
    models.tiny_llama().config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": architectures}))
    assert type(empty_model(str(tmp_path))).__name__ == expected


def test_the_random_state_is_left_alone(tmp_path: Path) -> None:
    path = save_config(models.tiny_llama(), tmp_path)
    before = torch.random.get_rng_state()
    dry_run(path, LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_errors_are_those_of_a_real_run(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="nearest: 'q_proj'"):
        dry_run(save_config(models.tiny_llama(), tmp_path), LoraConfig(target_modules=["q_prj"]))
    with pytest.raises(CheckpointError, match="no model config"):
        dry_run(str(tmp_path / "nothing"), LoraConfig(target_modules=["q_proj"]))
