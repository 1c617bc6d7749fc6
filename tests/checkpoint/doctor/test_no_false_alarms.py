"""Healthy adapters of every kind: nothing above a note is found, with the base or without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lamina
from lamina.checkpoint.doctor import examine
from lamina.config import LoraConfig
from tests import models
from tests.parity import matrix
from tests.stages.chains import fill_trainable, llama_lora, run_chain, run_stage

LIBRARIES = {"peft": peft, "lamina": lamina}
# What only readers that take the same out of the base again compute rightly: told, and rightly so.
OVER_ANOTHER_BASE = [("peft", "PiSSA"), ("peft", "OLoRA")]


def alarms(path: Path, **options: Any) -> list[str]:
    found = examine(path, **options)
    lines = [f"{f.code}: {f.what} {f.where[:3]}" for f in found.findings if f.severity != "note"]
    return [*lines, *found.unchecked]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    made: dict[str, nn.Module] = {
        "llama": models.tiny_llama(),
        "tied": models.tiny_llama(tie_word_embeddings=True),
        "gpt2": models.tiny_gpt2(),
        "bert": models.tiny_bert_classifier(),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)  # type: ignore[operator]
    return {name: str(folder / name) for name in made}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("variant", matrix.VARIANTS)
def test_of_every_kind_on_every_layer(
    library: str, variant: str, tmp_path: Path, bases: dict[str, str]
) -> None:
    lib = LIBRARIES[library]
    seen = 0
    for name, layer in matrix.LAYERS.items():
        cell = matrix.Cell(variant, name, "fp32", matrix.DIRECTIONS[0])
        base = layer.make()
        if matrix._refusal(lib, base, cell):
            continue
        model = matrix._adapted(lib, base, cell)
        matrix._fill(model)
        directory = tmp_path / name.replace(" ", "_")
        with matrix._quiet():
            model.save_pretrained(str(directory))
        displaced = (library, variant) in OVER_ANOTHER_BASE and ".lora_A.weight" in names_in(model)
        expected = ["init-changes-base"] if displaced else []
        assert examine(directory).codes("error") == []
        assert examine(directory).codes("warning") == expected
        for kind in ("llama", "gpt2"):
            if kind in name and library == "lamina":
                assert alarms(directory, base=bases[kind]) == []
        seen += 1
    assert seen


def names_in(model: nn.Module) -> str:
    names = " ".join(name for name, _ in model.named_parameters() if "lora_A" in name)
    return names.replace(".default", "")


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    "regex": ("llama", {"target_modules": r".*self_attn\.(q|v)_proj"}),
    "all": ("llama", {"target_modules": "all-linear"}),
    "without": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "ranks": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 4},
        },
    ),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "table": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "rows of two": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7]},
        },
    ),
    "tied rows": (
        "tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ),
    "classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "biases": ("bert", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "own biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "parameters": (
        "llama",
        {"target_modules": [], "target_parameters": ["q_proj.weight", "v_proj.weight"]},
    ),
}
BUILD: dict[str, Callable[[], nn.Module]] = {
    "llama": models.tiny_llama,
    "tied": lambda: models.tiny_llama(tie_word_embeddings=True),
    "gpt2": models.tiny_gpt2,
    "bert": models.tiny_bert_classifier,
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_of_every_config(library: str, name: str, tmp_path: Path, bases: dict[str, str]) -> None:
    lib = LIBRARIES[library]
    kind, config = CONFIGS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"r": 4, **config}
        model = lib.get_peft_model(BUILD[kind](), lib.LoraConfig(**settings))
        fill_trainable(model)
        model.save_pretrained(tmp_path)
    assert alarms(tmp_path) == []
    assert alarms(tmp_path, base=bases[kind]) == []


CHAINS: dict[str, list[tuple[str, str | None, LoraConfig | None]]] = {
    mode: [
        ("one", None, llama_lora()),
        ("two", mode, None if mode == "continue" else llama_lora(r=3, target_modules=["q_proj"])),
        ("three", "stack", llama_lora(r=2, lora_alpha=3, target_modules=["up_proj"])),
    ]
    for mode in ("continue", "stack", "merge")
}
CHAINS |= {
    "from pissa": [
        ("one", None, llama_lora(init_lora_weights="pissa")),
        ("two", "stack", llama_lora(r=2)),
    ],
    "to dora": [("one", None, llama_lora(use_dora=True))],
    "rslora": [("one", None, llama_lora(use_rslora=True)), ("two", "stack", llama_lora(r=3))],
    "biases of B": [("one", None, llama_lora(lora_bias=True)), ("two", "stack", llama_lora(r=3))],
    "with a head": [
        ("one", None, llama_lora(modules_to_save=["lm_head"])),
        ("two", "stack", llama_lora(r=3)),
    ],
    "embedding": [
        ("one", None, llama_lora(target_modules=["embed_tokens", "q_proj"])),
        ("two", "merge", llama_lora(r=3)),
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_of_every_chain(name: str, tmp_path: Path, bases: dict[str, str]) -> None:
    _, last = run_chain(tmp_path, CHAINS[name])
    assert alarms(last) == []
    assert alarms(last, base=bases["llama"]) == []


def test_in_half_precision(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return models.tiny_llama().to(torch.bfloat16)

    run_stage(tmp_path / "one", llama_lora(), build=build)
    assert alarms(tmp_path / "one") == []
    model = copy.deepcopy(lamina.get_peft_model(models.tiny_llama(), llama_lora()))
    fill_trainable(model)
    model.half().save_pretrained(tmp_path / "half")
    assert alarms(tmp_path / "half") == []


def test_beside_what_training_leaves(tmp_path: Path) -> None:
    model = run_stage(tmp_path / "one", llama_lora())
    (tmp_path / "one" / "checkpoint-10").mkdir()
    for file in ("optimizer.pt", "training_args.bin", "rng_state.pth", "README.md"):
        (tmp_path / "one" / file).write_bytes(b"x")
    assert model.active_adapters == ["one"]
    assert alarms(tmp_path / "one") == []
