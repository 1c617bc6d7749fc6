"""A tiny adapter and its base's config, the same bytes everywhere: no random numbers, no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from lamina.checkpoint.record import Base, Lamina, Stage, StageRecord

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 16, 4, 2, 4, 2, 12
PREFIX = "base_model.model."
Array = NDArray[np.float64]

# module -> (in, out, rank, alpha): foreign scalings, as no stage of ours has them.
MODULES: dict[str, tuple[int, int, int, float]] = {
    "model.layers.0.self_attn.q_proj": (HIDDEN, HEADS * HEAD_DIM, 2, 4),
    "model.layers.0.self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD_DIM, 2, 4),
    "model.layers.1.self_attn.q_proj": (HIDDEN, HEADS * HEAD_DIM, 3, 5),
    "model.layers.1.self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD_DIM, 2, 4),
    "model.layers.1.mlp.down_proj": (24, HIDDEN, 2, 7),
}


def values(*shape: int, seed: int) -> Tensor:
    """Numbers of few bits between -1 and 1 that repeat in no short period."""
    count = int(np.prod(shape))
    steps = (np.arange(count) * 7919 + 104729 * seed) % 251
    return torch.from_numpy(((steps - 125) / 128).reshape(shape).astype(np.float32))


def base_config(folder: Path, **changes: Any) -> Path:
    """A directory that has nothing of a base but its config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def adapter_config(**changes: Any) -> dict[str, Any]:
    """The config that `MODULES` has."""
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 7},
    }
    return settings | changes


def factors() -> dict[str, Tensor]:
    """The tensors of `MODULES`, by their names on disk."""
    tensors = {}
    for index, (module, (inner, outer, rank, _)) in enumerate(MODULES.items()):
        tensors[f"{PREFIX}{module}.lora_A.weight"] = values(rank, inner, seed=2 * index)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = values(outer, rank, seed=2 * index + 1)
    return tensors


def write(
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """An adapter's directory."""
    folder.mkdir(parents=True, exist_ok=True)
    given = dict(factors() if tensors is None else tensors)
    save_file(given, folder / "adapter_model.safetensors", metadata={**(metadata or {})} or None)
    chosen = adapter_config() if config is None else dict(config)
    (folder / "adapter_config.json").write_text(json.dumps(chosen))
    return folder


def record() -> StageRecord:
    """What Lamina would have written beside `MODULES`."""
    return StageRecord(
        stages=(Stage(name="sft", mode="fresh", base=Base(name_or_path="some/base")),),
        laminae=(
            Lamina(
                stage="sft",
                config=adapter_config(),
                ranks={module: rank for module, (_, _, rank, _) in MODULES.items()},
            ),
        ),
    )


def deltas(tensors: Mapping[str, Tensor] | None = None) -> dict[str, Array]:
    """Module -> alpha / r * B @ A in float64, by the numbers of `MODULES`."""
    given = factors() if tensors is None else tensors
    found = {}
    for module, (_, _, rank, alpha) in MODULES.items():
        a, b = (
            given[f"{PREFIX}{module}.{leaf}.weight"].double().numpy()
            for leaf in ("lora_A", "lora_B")
        )
        found[module] = alpha / rank * (b @ a)
    return found


def off(found: Array, expected: Array) -> float:
    """The largest difference of two entries, relative to the largest entry."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
