"""Weights that bitsandbytes stores in 4 or 8 bits.

Source: arXiv:2305.14314 (NF4, double quantisation), arXiv:2208.07339 (LLM.int8()).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.engine.weights.quantised import QuantisedWeight, is_of
from lamina.extras import require

_UNQUANTISED = "it is not quantised yet; move the model to its device first"


class Bnb4bitWeight(QuantisedWeight):
    """`Params4bit`: two codes a byte, and scales a block that may be quantised themselves."""

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        return is_of(layer._parameters.get("weight"), "bitsandbytes", "Params4bit")

    @property
    def quantised(self) -> str:
        weight = self.parameter
        nested = ", double quantisation" if weight.compress_statistics else ""
        return f"bitsandbytes {weight.quant_type}{nested}"

    @property
    def rounding(self) -> str:
        return "4-bit"

    @property
    def _state(self) -> Any:
        # Wrappers that rebuild parameters lose the weight's own; the layer keeps one too.
        return self.parameter.quant_state or getattr(self.layer, "quant_state", None)

    @property
    def why_not_writable(self) -> str | None:
        return super().why_not_writable or (_UNQUANTISED if self._state is None else None)

    may_stop_gradients = True

    @property
    def stops_gradients(self) -> bool:
        return _is_packed(self.parameter.quant_state)

    @property
    def value_dtype(self) -> torch.dtype:
        state = self._state
        return self.dtype if state is None else _value_dtype(state)

    def read(self) -> torch.Tensor:
        data: torch.Tensor = self.parameter.data
        return data if self._state is None else _dequantised4(data, self._state)

    def swap(self, values: torch.Tensor) -> Any:
        before: Any = self.parameter
        state = self._state
        parameters: Any = require("bitsandbytes.nn", "quant")
        after = parameters.Params4bit(
            values.contiguous(),
            requires_grad=False,
            blocksize=before.blocksize,
            compress_statistics=before.compress_statistics,
            quant_type=before.quant_type,
            quant_storage=before.quant_storage,
            module=self.layer,
        ).to(before.device)
        # The sum comes in fp32; what it is dequantised to stays what it was.
        after.quant_state.dtype = _value_dtype(state)
        if before.quant_state is None:
            before.quant_state = state
        self._put(after)
        return before

    def restore(self, stored: Any) -> None:
        device = self.device
        self._put(stored if stored.device == device else stored.to(device))

    def _put(self, parameter: Any) -> None:
        self.layer.weight = parameter
        self.layer.quant_state = parameter.quant_state

    def values_of(self, stored: Any) -> torch.Tensor:
        return _dequantised4(stored.data, stored.quant_state)


def _is_packed(state: Any) -> bool:
    # On a CPU with AVX512-BF16, inference rearranges the codes in place.
    return bool(getattr(state, "packing_format_for_cpu", False))


def _value_dtype(state: Any) -> torch.dtype:
    dtype: torch.dtype = state.original_dtype if _is_packed(state) else state.dtype
    return dtype


def _dequantised4(codes: torch.Tensor, state: Any) -> torch.Tensor:
    functional: Any = require("bitsandbytes.functional", "quant")
    if _is_packed(state):
        scales = state.absmax.T.reshape(-1).float()
        state = copy.copy(state)
        # The library's inverse leaves the scales transposed, so it is asked for the codes alone.
        state.original_nested = False
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = scales
    dense: torch.Tensor = functional.dequantize_4bit(codes, state)
    return dense


@dataclass(frozen=True)
class _Stored8bit:
    """What an 8-bit layer held: the parameter, and what the layer's state held beside it."""

    parameter: Any
    codes: torch.Tensor | None
    scales: torch.Tensor | None


class Bnb8bitWeight(QuantisedWeight):
    """`Int8Params`: a byte an entry, and a scale a row."""

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        known = is_of(layer._parameters.get("weight"), "bitsandbytes", "Int8Params")
        return known and hasattr(layer, "state")

    @property
    def quantised(self) -> str:
        return "bitsandbytes int8"

    @property
    def rounding(self) -> str:
        return "8-bit"

    @property
    def _state(self) -> Any:
        return self.layer.state

    @property
    def _is_quantised(self) -> bool:
        return self.dtype == torch.int8

    @property
    def why_not_writable(self) -> str | None:
        return super().why_not_writable or (None if self._is_quantised else _UNQUANTISED)

    @property
    def value_dtype(self) -> torch.dtype:
        return torch.float32 if self._is_quantised else self.dtype

    def read(self) -> torch.Tensor:
        return self.values_of(self._held())

    def _held(self) -> _Stored8bit:
        return _Stored8bit(self.parameter, self._state.CB, self._state.SCB)

    def swap(self, values: torch.Tensor) -> _Stored8bit:
        before = self._held()
        parameters: Any = require("bitsandbytes.nn", "quant")
        # It is quantised on its way from the CPU to the device.
        after = parameters.Int8Params(values.cpu(), requires_grad=False, has_fp16_weights=False)
        self.layer.weight = after.to(before.parameter.device)
        # The next forward takes codes and scales from the parameter.
        self._state.CB = self._state.SCB = None
        return before

    def restore(self, stored: _Stored8bit) -> None:
        device = self.device
        parameter = stored.parameter
        self.layer.weight = parameter if parameter.device == device else parameter.to(device)
        self._state.CB = None if stored.codes is None else stored.codes.to(device)
        self._state.SCB = None if stored.scales is None else stored.scales.to(device)

    def values_of(self, stored: _Stored8bit) -> torch.Tensor:
        parameter = stored.parameter
        if parameter.dtype != torch.int8:
            plain: torch.Tensor = parameter.data
            return plain
        scales: Any = stored.scales if parameter.SCB is None else parameter.SCB
        functional: Any = require("bitsandbytes.functional", "quant")
        dense: torch.Tensor = functional.int8_vectorwise_dequant(
            parameter.data, scales.to(parameter.device)
        )
        return dense
