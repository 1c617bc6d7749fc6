"""An adapter made by hand, so that one thing in it can be made wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lamina.checkpoint.doctor import Examination, examine
from tests import models
from tests.cli.made import chain_config, chain_record, chain_tensors

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHAPES = {"q_proj": (models.HIDDEN, models.HIDDEN), "v_proj": (models.HIDDEN // 2, models.HIDDEN)}


@dataclass
class Parts:
    """What an adapter's two files are made of; to be changed before it is written."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt", **self.metadata})
        (directory / CONFIG).write_text(json.dumps(self.config), encoding="utf-8")
        return directory


Change = Callable[[Parts], object]


def plain(layers: int = 6, r: int = 8) -> Parts:
    """Query and value projections of a Llama, as PEFT writes them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for name, (out, n_in) in SHAPES.items():
            module = f"{PREFIX}model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(r, n_in, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, r, generator=generator) * 0.1
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "owner/small",
    }
    return Parts(tensors, config)


def chain() -> Parts:
    """Three stages, `domain`, `more` and `chat`, the last over some modules only."""
    config = {**chain_config().to_dict(), "base_model_name_or_path": "models/small"}
    return Parts(chain_tensors(), config, chain_record().to_metadata())


def key(layer: int, name: str, side: str) -> str:
    return f"{PREFIX}model.layers.{layer}.self_attn.{name}.lora_{side}.weight"


def examined(parts: Parts, directory: Path, **options: Any) -> Examination:
    return examine(parts.write(directory), **options)
