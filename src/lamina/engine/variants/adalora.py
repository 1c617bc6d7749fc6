"""AdaLoRA: an update by singular values, some of which are set to zero while it trains.

Source: arXiv:2303.10512.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.config import AdaLoraConfig
from lamina.engine.variants.base import Update, Variant


class AdaLora(Variant):
    """`y = base(x) + lora_alpha / ranknum * B(E * A(dropout(x)))`, with E (r x 1).

    Layers of their own hold the factors, since PEFT names them without `.weight`; see
    `lamina.engine.layers.svd`. There E is a part of the update.
    """

    places = ("lora_E",)
    kinds = ("linear", "conv")

    def why_not(self, kind: str, base: nn.Module, config: Any, target: str) -> str | None:
        if kind == "conv" and not isinstance(base, nn.Conv2d):
            return "AdaLoRA adapts convolutions of two dimensions only"
        if kind == "conv" and getattr(base, "groups", 1) > 1:
            return f"AdaLoRA's update mixes channels across the {base.groups} groups"
        return super().why_not(kind, base, config, target)

    def scaling(self, r: int, lora_alpha: float, use_rslora: bool) -> float:
        return float(lora_alpha) if lora_alpha > 0 else float(r)

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        return result + layer.low_rank(adapter, x)

    def fold(self, layer: Update, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.add_(layer.delta_weight(adapter))


def is_adalora(config: Any) -> bool:
    """Whether a config means AdaLoRA."""
    return isinstance(config, AdaLoraConfig)
