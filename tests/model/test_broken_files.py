"""Directories that are broken, for every method: one error, and the base as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.config import AdaLoraConfig, KasaConfig, LoraConfig, MontecloraConfig
from lamina.errors import CheckpointError, ConfigError
from tests import models
from tests.adapters import WEIGHTS, fill, flags, llama_config, rewrite, same, weights
from tests.parity.kinds import KINDS

CONFIG = "adapter_config.json"
Tensors = dict[str, Tensor]


def moe() -> nn.Module:
    return KINDS["Mixtral"].make()


METHODS: dict[str, tuple[Callable[[], nn.Module], LoraConfig]] = {
    "plain": (models.tiny_llama, llama_config()),
    "DoRA": (models.tiny_llama, llama_config(use_dora=True)),
    "bias of B": (models.tiny_llama, llama_config(lora_bias=True)),
    "KaSA": (models.tiny_llama, llama_config(kasa_config=KasaConfig())),
    "MonteCLoRA": (models.tiny_llama, llama_config(monteclora_config=MontecloraConfig())),
    "rows": (models.tiny_llama, llama_config(trainable_token_indices=[3, 9])),
    "embedding": (models.tiny_llama, llama_config(target_modules=["embed_tokens"])),
    "whole": (models.tiny_llama, llama_config(modules_to_save=["lm_head"])),
    "AdaLoRA": (models.tiny_llama, AdaLoraConfig(total_step=9, target_modules=["q_proj"])),
    "experts": (moe, LoraConfig(**KINDS["Mixtral"].adapter)),
}


def change(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def broken(path: Path) -> None:
        def changed(tensors: Tensors) -> Tensors:
            change(tensors)
            return tensors

        rewrite(path, changed)

    return broken


def narrower(tensors: Tensors) -> None:
    for key, tensor in tensors.items():
        tensors[key] = tensor[..., :-1].contiguous()


def cut(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-50])


def strange_field(path: Path) -> None:
    values = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**values, "use_magic": True, "layer_replication": 3}))


BREAKS: dict[str, Callable[[Path], Any]] = {
    "cut short": cut,
    "empty": lambda path: (path / WEIGHTS).write_bytes(b""),
    "no weights": lambda path: (path / WEIGHTS).unlink(),
    "no config": lambda path: (path / CONFIG).unlink(),
    "half a config": lambda path: (path / CONFIG).write_text("{"),
    "a strange field": strange_field,
    "the first is missing": change(lambda tensors: tensors.pop(min(tensors))),
    "the last is missing": change(lambda tensors: tensors.pop(max(tensors))),
    "one too many": change(
        lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.ones(2, 2)})
    ),
    "other shapes": change(narrower),
    "a scalar": change(lambda tensors: tensors.update({min(tensors): torch.tensor(1.0)})),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_broken_is_refused_and_the_base_stays(method: str, tmp_path: Path) -> None:
    make, config = METHODS[method]
    model = lamina.get_peft_model(make(), config)
    fill(model)
    base = make()
    before = weights(base), flags(base), [(n, type(m)) for n, m in base.named_modules()]
    for name, broken in BREAKS.items():
        path = tmp_path / name
        model.save_pretrained(path)
        broken(path)
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            lamina.PeftModel.from_pretrained(base, path)
        assert str(path) in str(caught.value) or name == "a strange field", name
        assert same(weights(base), before[0]), name
        assert (flags(base), [(n, type(m)) for n, m in base.named_modules()]) == before[1:], name
    model.save_pretrained(tmp_path / "whole")
    assert lamina.PeftModel.from_pretrained(base, tmp_path / "whole")
