"""Weights of torchao: tensor subclasses that dequantise themselves.

torchao has no call that quantises a tensor as another one was, so each class whose settings can be
read off a tensor has its own here. Others train and infer; folding into them is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lamina.engine.weights.quantised import QuantisedWeight, is_of
from lamina.errors import FoldError
from lamina.extras import require

Requantise = Callable[[Any, torch.Tensor], Any]


class TorchaoWeight(QuantisedWeight):
    """A weight of one of torchao's tensor classes."""

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        return is_of(layer._parameters.get("weight"), "torchao")

    @property
    def quantised(self) -> str:
        weight = self.parameter
        dynamic = _activation_quantiser(weight) is not None
        return f"torchao {type(weight).__name__}{', quantised activations' if dynamic else ''}"

    @property
    def may_stop_gradients(self) -> bool:  # type: ignore[override]
        return self.stops_gradients

    @property
    def stops_gradients(self) -> bool:
        return _activation_quantiser(self.parameter) is not None

    @property
    def why_not_writable(self) -> str | None:
        weight = self.parameter
        if weight.is_meta:
            return "it is on the meta device"
        if not hasattr(weight, "dequantize") or type(weight).__name__ not in _REQUANTISE:
            return f"torchao's {type(weight).__name__} can't be quantised again from values"
        if getattr(weight, "act_pre_scale", None) is not None:
            return "its inputs are scaled first, so that it isn't the weight they meet"
        return None

    @property
    def why_not_readable(self) -> str | None:
        known = hasattr(self.parameter, "dequantize")
        return None if known else f"torchao's {type(self.parameter).__name__} can't be dequantised"

    def read(self) -> torch.Tensor:
        return self.values_of(self.parameter)

    @torch.no_grad()
    def swap(self, values: torch.Tensor) -> Any:
        before = self.parameter
        after = _REQUANTISE[type(before).__name__](before, values.to(torch.float32))
        # The sum comes in fp32; what the tensor calls itself stays what it was.
        after = _with_dtype(after, before.dtype)
        self.layer.weight = nn.Parameter(after, requires_grad=False)
        return before

    def restore(self, stored: Any) -> None:
        device = self.device
        same = stored.device == device
        self.layer.weight = stored if same else nn.Parameter(stored.to(device), requires_grad=False)

    @torch.no_grad()
    def values_of(self, stored: Any) -> torch.Tensor:
        if not hasattr(stored, "dequantize"):
            raise FoldError(
                f"torchao's {type(stored).__name__} can't be dequantised.",
                cure="load the base in int8, or dense",
            )
        dense: torch.Tensor = stored.dequantize()
        return dense


def _activation_quantiser(weight: Any) -> Any:
    old = getattr(weight, "activation_quantization", None)
    return old if old is not None else getattr(weight, "act_quant_kwargs", None)


def _with_dtype(weight: Any, dtype: torch.dtype) -> Any:
    """The same codes and scales under another dtype of the dequantised values."""
    if weight.dtype == dtype:
        return weight
    names, attributes = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    return type(weight).__tensor_unflatten__(
        parts, {**attributes, "dtype": dtype}, weight.size(), weight.stride()
    )


def _mapping(zero_point: torch.Tensor | None) -> Any:
    kinds: Any = require("torchao.quantization.quant_primitives", "quant").MappingType
    shifted = zero_point is not None and bool(zero_point.any())
    return kinds.ASYMMETRIC if shifted else kinds.SYMMETRIC


def _granularity(weight: Any) -> Any:
    """How many entries share a scale, from the block that one is for."""
    kinds: Any = require("torchao.quantization.granularity", "quant")
    block, shape = list(weight.block_size), list(weight.shape)
    if block == shape:
        return kinds.PerTensor()
    return kinds.PerRow() if block[-1] == shape[-1] else kinds.PerGroup(block[-1])


def _int8(before: Any, values: torch.Tensor) -> Any:
    return type(before).from_hp(
        values,
        _granularity(before),
        mapping_type=_mapping(before.zero_point),
        act_quant_kwargs=before.act_quant_kwargs,
        act_quant_scale=before.act_quant_scale,
        act_quant_zero_point=before.act_quant_zero_point,
        reduce_range=before.reduce_range,
    )


def _float8(before: Any, values: torch.Tensor) -> Any:
    return type(before).from_hp(
        values,
        float8_dtype=before.qdata.dtype,
        granularity=_granularity(before),
        mm_config=before.mm_config,
        kernel_preference=before.kernel_preference,
        act_quant_kwargs=before.act_quant_kwargs,
    )


def _intx(before: Any, values: torch.Tensor) -> Any:
    return type(before).from_hp(
        values,
        tuple(before.block_size),
        before.target_dtype,
        mapping_type=_mapping(before.zero_point),
        activation_quantization=before.activation_quantization,
    )


_REQUANTISE: dict[str, Requantise] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
}
