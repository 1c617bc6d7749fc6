"""What a variant has to say: its part of the forward, and its part of a folded weight."""

from __future__ import annotations

from typing import Protocol

import torch


class Update(Protocol):
    """What a variant may ask of a layer."""

    def low_rank(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`scaling * B(A(dropout(x)))`, shaped like the base's output."""

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A`, shaped like the base's weight, summed in at least fp32."""


class Variant(Protocol):
    """One method; it has no state of its own, so one object serves all layers."""

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """`result` with the adapter's part for the input `x` added."""

    def fold(self, layer: Update, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` (in the accumulation dtype; may be written into) with the update added."""
