"""A weight that FSDP has gathered for a forward that is running."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.engine.weights.base import BaseWeight
from lamina.errors import FoldError


class GatheredWeight(BaseWeight):
    """`layer.weight` as a plain tensor, a view of FSDP's flat parameter: read, never written."""

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        weight = layer.__dict__.get("weight")
        # A quantiser's codes may be stored in a floating dtype.
        packed = hasattr(layer, "quant_state")
        return type(weight) is torch.Tensor and weight.dtype.is_floating_point and not packed

    @property
    def why_not_writable(self) -> str | None:
        return "FSDP has gathered it for this forward only"

    @property
    def device(self) -> torch.device:
        return self.read().device

    @property
    def dtype(self) -> torch.dtype:
        return self.read().dtype

    def read(self) -> torch.Tensor:
        weight: torch.Tensor = self.layer.__dict__["weight"]
        return weight.detach()

    def swap(self, values: torch.Tensor) -> torch.Tensor:
        raise FoldError(f"The weight can't be written: {self.why_not_writable}.")

    def restore(self, stored: Any) -> None:
        raise FoldError(f"The weight can't be written: {self.why_not_writable}.")

    def values_of(self, stored: torch.Tensor) -> torch.Tensor:
        return stored
