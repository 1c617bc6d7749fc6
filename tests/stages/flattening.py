"""A chain to flatten, and how far two adapters are apart."""

from __future__ import annotations

from lamina.config import LoraConfig
from tests.stages.chains import (
    llama_lora,
)

FOUR: list[tuple[str, str | None, LoraConfig | None]] = [
    ("domain", None, llama_lora(target_modules="all-linear")),
    ("chat", "stack", llama_lora(r=6, lora_alpha=6, target_modules=["q_proj", "embed_tokens"])),
    ("polish", "continue", None),
    (
        "dpo",
        "merge",
        llama_lora(
            r=5,
            lora_alpha=7,
            use_rslora=True,
            target_modules=["o_proj", "v_proj"],
            rank_pattern={"1.self_attn.v_proj": 3},
        ),
    ),
]
