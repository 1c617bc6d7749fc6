"""A parameter of a module that is adapted by itself, whatever the module does with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.engine.weights.dense import DenseWeight


class ParameterWeight(DenseWeight):
    """`layer.<name>` read and written as a tensor.

    Args:
        layer: the module that has the parameter.
        name: the parameter's name in it.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(layer)
        self.name = name

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        return False

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself; under a parametrization, the one that is stored."""
        if self.is_parametrized:
            lists: Any = self.layer.parametrizations
            original: nn.Parameter = lists[self.name].original
            return original
        parameter = self.layer._parameters[self.name]
        assert parameter is not None
        return parameter

    @property
    def is_parametrized(self) -> bool:
        """Whether torch computes the values from another parameter."""
        return nn.utils.parametrize.is_parametrized(self.layer, self.name)

    @property
    def why_not_writable(self) -> str | None:
        if self.is_parametrized:
            return f"{self.name} is parametrized: its values are computed in every forward"
        weight = self.parameter
        plain = type(weight.data) is torch.Tensor and weight.dtype.is_floating_point
        if not plain or weight.dtype.itemsize < 2:
            return f"{self.name} doesn't hold dense floating-point values"
        return super().why_not_writable
