"""MiCA: plain LoRA whose B never trains. Source: arXiv:2604.01694."""

from __future__ import annotations

from typing import Any

from lamina.engine.variants.plain import PlainLora


class MicaLora(PlainLora):
    """`y = base(x) + scaling * B(A(dropout(x)))`, with B fixed to the base's minor directions."""

    is_plain = False
    frozen = ("lora_B.weight", "lora_embedding_B")
    kinds = ("linear", "embedding")


def is_mica(config: Any) -> bool:
    """Whether a config means MiCA."""
    return str(config.init_lora_weights).lower() == "mica"
