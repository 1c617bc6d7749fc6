"""LoRA on convolutions: A convolves to r channels with the base's kernel, B mixes channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lamina.engine.dtypes import accumulation_dtype, to_adapter_input
from lamina.engine.layers.base import LayerAdapter, LoraLayer
from lamina.engine.state import AdapterState

_CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _ConvNd(LoraLayer):
    """`y = base(x) + scaling * conv_1(conv_A(x))`, A (r x in x kernel), B (out x r/groups x 1).

    Stride, padding, dilation and padding mode of A are the base's.
    """

    kind = "conv"
    dimensions: int

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__(base_layer, state)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.in_features = base_layer.in_channels
        self.out_features = base_layer.out_channels

    def add_factors(self, name: str, record: LayerAdapter, dtype: torch.dtype) -> None:
        base, make = self.base_layer, _CONVS[self.dimensions]
        options = {"device": "meta", "dtype": dtype}
        self.lora_A[name] = make(
            base.in_channels,
            record.r,
            base.kernel_size,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            padding_mode=base.padding_mode,
            bias=False,
            **options,
        )
        self.lora_B[name] = make(
            record.r, base.out_channels, 1, groups=base.groups, bias=record.lora_bias, **options
        )

    def dropped(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        a: Any = self.lora_A[adapter]
        if self.cast_input_dtype_enabled:
            x = to_adapter_input(x, a.weight.dtype)
        dropped: torch.Tensor = self.lora_dropout[adapter](x)
        return dropped

    def update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.lora_B[adapter](self.lora_A[adapter](x))
        return update * self.records[adapter].scaling

    def delta_weight(self, adapter: str) -> torch.Tensor:
        a, b = self.factors(adapter)
        dtype = accumulation_dtype(a.dtype)
        flat_B = b.to(dtype).flatten(1)
        groups = self.base_layer.groups
        flat_A = a.to(dtype).flatten(1).unflatten(0, (groups, -1))
        per_group = flat_B.unflatten(0, (groups, -1)) @ flat_A
        delta: torch.Tensor = per_group.reshape(-1, *a.shape[1:])
        return delta * self.records[adapter].scaling

    def why_not_foldable(self, names: Sequence[str]) -> str | None:
        groups = self.base_layer.groups
        if groups > 1:
            return f"its update mixes channels across the {groups} groups of the convolution"
        return super().why_not_foldable(names)


class Conv1d(_ConvNd):
    """LoRA on `nn.Conv1d`."""

    dimensions = 1


class Conv2d(_ConvNd):
    """LoRA on `nn.Conv2d`."""

    dimensions = 2


class Conv3d(_ConvNd):
    """LoRA on `nn.Conv3d`."""

    dimensions = 3
