"""LoRA on linear layers: `nn.Linear`, transformers' `Conv1D`, and opaque ones of quantisers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lamina.engine.dtypes import to_adapter_input
from lamina.engine.layers.base import LayerAdapter, LoraLayer
from lamina.engine.ops.dispatch import lora_linear, lora_linear_delta
from lamina.engine.state import AdapterState


class Linear(LoraLayer):
    """`y = base(x) + scaling * x @ A.T @ B.T`, with A (r x in) and B (out x r)."""

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__(base_layer, state)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.in_features, self.out_features = linear_shape(base_layer)

    def add_factors(self, name: str, record: LayerAdapter, dtype: torch.dtype) -> None:
        self.lora_A[name] = _bare_linear(self.in_features, record.r, False, dtype)
        self.lora_B[name] = _bare_linear(record.r, self.out_features, record.lora_bias, dtype)

    def dropped(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        a: Any = self.lora_A[adapter]
        if self.cast_input_dtype_enabled:
            x = to_adapter_input(x, a.weight.dtype)
        dropped: torch.Tensor = self.lora_dropout[adapter](x)
        return dropped

    def update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        a: Any = self.lora_A[adapter]
        b: Any = self.lora_B[adapter]
        # Offloading and layerwise casting bring a weight into place right before its module runs.
        if a._forward_pre_hooks or b._forward_pre_hooks or a._forward_hooks or b._forward_hooks:
            scaled: torch.Tensor = b(a(x)) * self.records[adapter].scaling
            return scaled
        return lora_linear(x, a.weight, b.weight, b.bias, self.records[adapter].scaling)

    def delta_weight(self, adapter: str) -> torch.Tensor:
        a, b = self.factors(adapter)
        # Rows are those of the weight as it is stored.
        left, right = (a.T, b.T) if self.fan_in_fan_out else (b, a)
        return lora_linear_delta(right, left, self.records[adapter].scaling)


def store_in_by_out(layers: Iterable[LoraLayer]) -> bool:
    """Whether the linear ones among these layers store their weights (in x out), if there are any.

    That is what `fan_in_fan_out` says in a config.
    """
    stored = [layer.__dict__.get("fan_in_fan_out") for layer in layers]
    linear = [across for across in stored if across is not None]
    return bool(linear) and all(linear)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, a linear layer that stores its weight (in x out)."""
    # By name along the MRO, so that the engine doesn't import transformers.
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
        for kind in type(layer).__mro__
    )


def linear_shape(layer: Any) -> tuple[int, int]:
    """(in features, out features) of anything linear."""
    if is_conv1d(layer):
        nx, nf = layer.weight.shape
        return int(nx), int(nf)
    return int(layer.in_features), int(layer.out_features)


def _bare_linear(n_in: int, n_out: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    # On the meta device: nn.Linear would initialise what is initialised or loaded right after.
    return nn.Linear(n_in, n_out, bias=bias, device="meta", dtype=dtype)
