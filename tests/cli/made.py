"""Adapter directories made by hand, so that everything in them is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from lamina.checkpoint.adapter import WEIGHTS_NAME
from lamina.checkpoint.record import Base, Lamina, Stage, StageRecord
from lamina.cli import app
from lamina.config import CONFIG_NAME, LoraConfig

PREFIX = "base_model.model."
MODULES = tuple(
    f"model.layers.{layer}.self_attn.{name}"
    for layer in (0, 1, 10)
    for name in ("q_proj", "v_proj")
)
DOMAIN = dict.fromkeys(MODULES, 4)
CHAT = {module: 6 for module in MODULES if module.endswith("q_proj")}
BASE = Base(
    name_or_path="models/small", model_class="LlamaForCausalLM", dtype="float32", vocab_size=64
)


def lamina(*arguments: object, columns: int = 120) -> Result:
    """What the command line answers."""
    words = [str(each) for each in arguments]
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, words)


def chain_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two groups of ranks, in 32 features and out 16, no entry of which is zero."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in MODULES:
        rank = DOMAIN[module] + CHAT.get(module, 0)
        for leaf, shape in (("lora_A", (rank, 32)), ("lora_B", (16, rank))):
            values = torch.rand(shape, generator=generator) + 0.5
            tensors[f"{PREFIX}{module}.{leaf}.weight"] = values.to(dtype)
    return tensors


def chain_record(**changes: Any) -> StageRecord:
    """domain (fresh), more (continue), chat (stack)."""
    domain = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    chat = LoraConfig(r=6, lora_alpha=12, target_modules=["q_proj"])
    values: dict[str, Any] = {
        "stages": (
            Stage(name="domain", mode="fresh", created="2026-11-24T08:10:59Z", base=BASE),
            Stage(name="more", mode="continue", metrics={"eval_loss": 1.25}, base=BASE),
            Stage(name="chat", mode="stack", data={"files": ["a.jsonl"]}, base=BASE),
        ),
        "laminae": (
            Lamina(stage="more", config=domain.to_dict(), ranks=DOMAIN),
            Lamina(stage="chat", config=chat.to_dict(), ranks=CHAT),
        ),
    }
    return StageRecord(**values | changes)


def chain_config(**changes: Any) -> LoraConfig:
    """The config of the whole: alpha / r is 2 everywhere."""
    values: dict[str, Any] = {
        "r": 10,
        "lora_alpha": 20,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"v_proj": 8},
    }
    return LoraConfig(**values | changes)


def write_chain(
    directory: Path,
    tensors: dict[str, Tensor] | None = None,
    record: StageRecord | None = None,
    config: LoraConfig | None = None,
) -> Path:
    """Write the chain; what is given takes the place of what it usually has."""
    record = record or chain_record()
    tensors = chain_tensors() if tensors is None else tensors
    # A save refuses some of what a file may have: NaN, say.
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / WEIGHTS_NAME
    save_file(tensors, file, metadata={"format": "pt", **record.to_metadata()})
    (directory / CONFIG_NAME).write_text((config or chain_config()).to_json())
    return directory


def key(module: str, leaf: str) -> str:
    """A factor's name in the file."""
    return f"{PREFIX}{module}.{leaf}.weight"
