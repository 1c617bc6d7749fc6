"""Valid adapter directories of every kind: what the mutants are made from."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lamina.config import AdaLoraConfig, LoraConfig
from lamina.model import get_peft_model
from lamina.stages import begin_stage, save_stage
from tests import models
from tests.stages.chains import fill_trainable

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INDEX, PICKLE = "adapter_model.safetensors.index.json", "adapter_model.bin"
Build = Callable[[], nn.Module]


class Experts(nn.Module):
    """Two experts with a weight of three dimensions, each for half of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 2
        self.up = nn.Parameter(torch.randn(2, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = [nn.functional.linear(half, self.up[i]) for i, half in enumerate(x.chunk(2))]
        return torch.cat(halves)


class Mixture(nn.Module):
    """Experts and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.experts(x))
        return out


def mixture() -> Mixture:
    with models.seeded(0):
        return Mixture().eval()


def convolutions() -> nn.Module:
    return models.convolution_net(2)


BASES: dict[str, Build] = {
    "llama": models.tiny_llama,
    "embedding": models.embedding_net,
    "convolutions": convolutions,
    "mixture": mixture,
    "perceptron": models.perceptron,
}


@dataclass(frozen=True)
class Kind:
    """One kind of directory.

    Attributes:
        base: of `BASES`.
        make: writes the directory.
    """

    base: str
    make: Callable[[Path], None]


def _lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def _plain(base: str, config: LoraConfig) -> Kind:
    def make(path: Path) -> None:
        model = get_peft_model(BASES[base](), config)
        fill_trainable(model)
        model.save_pretrained(path)

    return Kind(base, make)


def _stages(base: str, *steps: tuple[str, str | None, LoraConfig | None]) -> Kind:
    def make(path: Path) -> None:
        parent = None
        for position, (name, mode, config) in enumerate(steps):
            last = position == len(steps) - 1
            target = path if last else path.parent / f".{path.name}-{name}"
            model = begin_stage(BASES[base](), name=name, parent=parent, mode=mode, config=config)
            fill_trainable(model, seed=position + 1)
            save_stage(model, target, metrics={"loss": 1.5}, data={"files": ["a.jsonl"]})
            parent = target

    return Kind(base, make)


def _sharded(path: Path) -> None:
    """Plain tensors in three shards with an index."""
    KINDS["patterns"].make(path)
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    weight_map = {}
    for number in range(3):
        name = f"adapter_model-{number + 1:05}-of-00003.safetensors"
        keys = sorted(tensors)[number::3]
        save_file({key: tensors[key] for key in keys}, path / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(keys, name))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index))


def _pickled(path: Path) -> None:
    """A pickle and nothing else."""
    KINDS["plain"].make(path)
    torch.save(load_file(path / WEIGHTS), path / PICKLE)
    (path / WEIGHTS).unlink()


def _beside(path: Path) -> None:
    """A pickle of other values beside the safetensors, which count."""
    KINDS["plain"].make(path)
    tensors = {key: value + 1 for key, value in load_file(path / WEIGHTS).items()}
    torch.save(tensors, path / PICKLE)


KINDS: dict[str, Kind] = {
    "plain": _plain("llama", _lora()),
    "chain": _stages(
        "llama",
        ("domain", None, _lora()),
        ("more", "continue", None),
        ("chat", "stack", _lora(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"])),
    ),
    "patterns": _plain(
        "llama",
        _lora(
            target_modules=r".*\.(q_proj|v_proj|down_proj)",
            rank_pattern={r"layers\.0\..*q_proj": 2, "v_proj": 6},
            alpha_pattern={"down_proj": 3.5},
            use_rslora=True,
        ),
    ),
    "sharded": Kind("llama", _sharded),
    "DoRA": _plain("llama", _lora(use_dora=True)),
    "embedding": _plain("embedding", LoraConfig(r=3, target_modules=["embed", "head"])),
    "convolutions": _plain(
        "convolutions", LoraConfig(r=4, target_modules=["stem", "grouped"], lora_alpha=4)
    ),
    "whole": _plain("llama", _lora(modules_to_save=["lm_head"])),
    "bias of B": _stages("llama", ("one", None, _lora(lora_bias=True, init_lora_weights=True))),
    "biases": _stages(
        "perceptron",
        ("one", None, LoraConfig(r=3, target_modules=["up", "down"], bias="all")),
        ("two", "continue", None),
    ),
    "AdaLoRA": _plain(
        "llama", AdaLoraConfig(total_step=9, init_r=4, target_modules=["q_proj", "v_proj"])
    ),
    "rows": _plain("llama", _lora(trainable_token_indices={"embed_tokens": [3, 9, 11]})),
    "experts": _plain(
        "mixture", LoraConfig(r=2, target_modules=["head"], target_parameters=["experts.up"])
    ),
    "aLoRA": _plain("llama", _lora(alora_invocation_tokens=[5, 6])),
    "PiSSA": _stages(
        "llama",
        ("one", None, _lora(init_lora_weights="pissa")),
        ("two", "stack", _lora(r=2)),
    ),
    "pickle": Kind("llama", _pickled),
    "pickle beside": Kind("llama", _beside),
}


def make_corpus(folder: Path) -> None:
    """Write one directory of each kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kind in KINDS.items():
            kind.make(folder / name)


if __name__ == "__main__":
    from tests.torture.fuzz_bases import make_base

    make_corpus(Path(sys.argv[1]))
    make_base(Path(sys.argv[1]))
