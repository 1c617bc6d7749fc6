"""A weight that is an ordinary floating-point parameter."""

from __future__ import annotations

import torch
from torch import nn

from lamina.engine.weights.base import BaseWeight

ON_META = "it is on the meta device"


class DenseWeight(BaseWeight):
    """`layer.weight` as torch stores it: read, written and replaced as a tensor."""

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        weight = layer._parameters.get("weight")
        # A quantiser's parameter class may sit on top of a plain tensor, or a tensor class of its
        # own below the plain parameter; torch.func puts plain tensors into a parameter's place.
        plain = type(weight) is torch.Tensor or (
            type(weight) is nn.Parameter and type(weight.data) is torch.Tensor
        )
        if weight is None or not plain:
            return False
        return weight.dtype.is_floating_point and weight.dtype.itemsize >= 2

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        parameter = self.layer._parameters["weight"]
        assert parameter is not None
        return parameter

    @property
    def why_not_writable(self) -> str | None:
        return ON_META if self.parameter.is_meta else None

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    def read(self) -> torch.Tensor:
        return self.parameter.detach()

    def swap(self, values: torch.Tensor) -> torch.Tensor:
        before = self.parameter.data
        self.parameter.data = values.to(device=before.device, dtype=before.dtype)
        return before

    def restore(self, stored: torch.Tensor) -> None:
        parameter = self.parameter
        parameter.data = stored.to(device=parameter.device, dtype=parameter.dtype)

    def values_of(self, stored: torch.Tensor) -> torch.Tensor:
        return stored
