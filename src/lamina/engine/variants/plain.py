"""Plain LoRA: the update is added. Source: arXiv:2106.09685."""

from __future__ import annotations

import torch

from lamina.engine.variants.base import Update


class PlainLora:
    """`y = base(x) + scaling * B(A(dropout(x)))`."""

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """`result` plus the low-rank part."""
        return result + layer.low_rank(adapter, x)

    def fold(self, layer: Update, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` plus the dense update."""
        return weight.add_(layer.delta_weight(adapter))
