"""A weight that only its own layer understands, such as a quantised one."""

from __future__ import annotations

import torch
from torch import nn

from lamina.engine.weights.base import BaseWeight
from lamina.errors import FoldError


class OpaqueWeight(BaseWeight):
    """Used through the layer's forward alone; reading and writing are refused."""

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        return True

    @property
    def why_not_writable(self) -> str | None:
        kind = type(self.layer).__name__
        if "qweight" in {*self.layer._parameters, *self.layer._buffers}:
            return f"a {kind} holds a quantised weight (qweight) that only it can read"
        return f"a {kind} doesn't hold a dense floating-point weight"

    @property
    def why_not_readable(self) -> str | None:
        return self.why_not_writable

    def _any_tensor(self) -> torch.Tensor | None:
        tensors = [*self.layer.parameters(recurse=False), *self.layer.buffers(recurse=False)]
        return tensors[0] if tensors else None

    @property
    def device(self) -> torch.device:
        tensor = self._any_tensor()
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        tensor = self._any_tensor()
        # An unknown tensor subclass may call itself bf16 without being stored so.
        if tensor is None or type(tensor.data) is not torch.Tensor:
            return torch.uint8
        return tensor.dtype

    def read(self) -> torch.Tensor:
        raise FoldError(f"The weight can't be read: {self.why_not_writable}.")

    def swap(self, values: torch.Tensor) -> torch.Tensor:
        raise FoldError(f"The weight can't be written: {self.why_not_writable}.")

    def restore(self, stored: object) -> None:
        raise FoldError(f"The weight can't be written: {self.why_not_writable}.")

    def values_of(self, stored: object) -> torch.Tensor:
        raise FoldError(f"The weight can't be read: {self.why_not_writable}.")
