"""How llama.cpp and MLX name and lay out the layers of a model.

Source: llama.cpp, `conversion/*.py` (which architecture a class becomes, and which of its weights
are reordered); mlx-lm 0.32, `mlx_lm/models/*.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Architecture:
    """A class of models in llama.cpp.

    Attributes:
        name: `general.architecture`.
        rotated: whether the rows of queries and keys lie in the order of ggml's rotary embedding,
            pairs side by side, instead of halves one after the other.
        own_head: whether it can have an output weight besides the input embedding.
    """

    name: str
    rotated: bool = False
    own_head: bool = True


GGUF_ARCHITECTURES = {
    "ArceeForCausalLM": Architecture("arcee", rotated=True),
    "Cohere2ForCausalLM": Architecture("cohere2", own_head=False),
    "CohereForCausalLM": Architecture("command-r", own_head=False),
    "GPT2LMHeadModel": Architecture("gpt2"),
    "Gemma2ForCausalLM": Architecture("gemma2", own_head=False),
    "Gemma3ForCausalLM": Architecture("gemma3"),
    "GemmaForCausalLM": Architecture("gemma", own_head=False),
    "GraniteForCausalLM": Architecture("granite", rotated=True),
    "LlamaForCausalLM": Architecture("llama", rotated=True),
    "MistralForCausalLM": Architecture("llama", rotated=True),
    "MixtralForCausalLM": Architecture("llama", rotated=True),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "OlmoForCausalLM": Architecture("olmo", rotated=True),
    "OlmoeForCausalLM": Architecture("olmoe"),
    "Phi3ForCausalLM": Architecture("phi3"),
    "PhiForCausalLM": Architecture("phi2"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe"),
    "SeedOssForCausalLM": Architecture("seed_oss"),
    "SmolLM3ForCausalLM": Architecture("smollm3", rotated=True),
    "StableLmForCausalLM": Architecture("stablelm"),
    "Starcoder2ForCausalLM": Architecture("starcoder2"),
}

# Model types whose layers MLX calls as transformers does.
MLX_MODEL_TYPES = (
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)


def rotate_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in ggml's order: row (head, half, i) becomes (head, i, half)."""
    moved: torch.Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return moved.reshape(rows.shape)


def unrotate_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo `rotate_rows`."""
    moved: torch.Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2)
    return moved.reshape(rows.shape)
