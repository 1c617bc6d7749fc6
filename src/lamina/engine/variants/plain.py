"""Plain LoRA: the update is added. Source: arXiv:2106.09685."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina.engine.variants.base import Update, Variant


class PlainLora(Variant):
    """`y = base(x) + scaling * B(A(dropout(x)))`."""

    is_plain = True
    is_sum = True
    kinds: Sequence[str] = ("linear", "embedding", "conv", "experts", "attention")

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        return result + layer.low_rank(adapter, x)
