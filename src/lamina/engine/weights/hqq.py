"""Weights of HQQ: codes packed into bytes, with scale and zero point a group.

Source: https://mobiusml.github.io/hqq_blog/ (Badri and Shaji, 2023).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.engine.weights.quantised import QuantisedWeight, is_of
from lamina.extras import require


@dataclass(frozen=True)
class _StoredHqq:
    """What an HQQ layer held."""

    codes: Any
    meta: dict[str, Any]


class HqqWeight(QuantisedWeight):
    """The weight of an `HQQLinear`, which the layer holds as `W_q` and `meta`."""

    # Any: torch types the attributes of a module as Tensor | Module.
    layer: Any

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        return is_of(layer, "hqq", "HQQLinear")

    @property
    def quantised(self) -> str:
        settings = self.layer.quant_config["weight_quant_params"]
        return f"hqq {settings['nbits']}-bit, groups of {settings['group_size']}"

    @property
    def parameter(self) -> Any:
        return self.layer.W_q

    @property
    def why_not_writable(self) -> str | None:
        if not self.layer.ready:
            return "it is not quantised yet"
        return super().why_not_writable

    @property
    def value_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.layer.compute_dtype
        return dtype

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        dense: torch.Tensor = self.layer.dequantize().to(self.value_dtype)
        return dense

    def swap(self, values: torch.Tensor) -> _StoredHqq:
        layer = self.layer
        before = _StoredHqq(layer.W_q, layer.meta)
        settings = copy.deepcopy(layer.quant_config)
        hqq: Any = require("hqq.core.quantize", "quant")
        # A layer can be quantised only once, so another one does it.
        other = hqq.HQQLinear(
            None,
            {**settings, "offload_meta": layer.offload_meta},
            compute_dtype=layer.compute_dtype,
            device=str(before.codes.device),
        )
        other.quantize(values, **settings)
        layer.W_q, layer.meta = other.W_q, other.meta
        return before

    def restore(self, stored: _StoredHqq) -> None:
        # HQQ layers stay where they were quantised.
        self.layer.W_q, self.layer.meta = stored.codes, stored.meta

    def values_of(self, stored: _StoredHqq) -> torch.Tensor:
        layer = self.layer
        now = _StoredHqq(layer.W_q, layer.meta)
        self.restore(stored)
        try:
            return self.read()
        finally:
            self.restore(now)
