"""The layers of quantisers by peft's names: Lamina has one `Linear` for all of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from lamina.engine.layers import Linear
from lamina.engine.weights import weight_of


class _Over(type):
    """The metaclass of a class that adapted layers over a certain base layer are instances of."""

    over: tuple[str, ...] = ()

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Linear) and cls._is_base(instance.get_base_layer())

    def _is_base(cls, base: nn.Module) -> bool:
        return any(kind.__name__ in cls.over for kind in type(base).__mro__)


class _OverTorchao(_Over):
    """Torchao keeps the layer and changes the class of its weight."""

    def _is_base(cls, base: nn.Module) -> bool:
        return type(weight_of(base)).__name__ == "TorchaoWeight"


class Linear4bit(metaclass=_Over):
    """Over bitsandbytes' 4-bit layer."""

    over = ("Linear4bit",)


class Linear8bitLt(metaclass=_Over):
    """Over bitsandbytes' 8-bit layer."""

    over = ("Linear8bitLt",)


class HqqLoraLinear(metaclass=_Over):
    """Over HQQ's layer."""

    over = ("HQQLinear",)


class GPTQLoraLinear(metaclass=_Over):
    """Over GPTQModel's layers."""

    over = ("BaseQuantLinear",)


class AwqLoraLinear(metaclass=_Over):
    """Over GPTQModel's layers for AWQ."""

    over = ("AwqGEMMQuantLinear", "WQLinear_GEMM")


class AqlmLoraLinear(metaclass=_Over):
    """Over AQLM's layer."""

    over = ("QuantizedLinear",)


class EetqLoraLinear(metaclass=_Over):
    """Over EETQ's layer."""

    over = ("EetqLinear",)


class IncLoraLinear(metaclass=_Over):
    """Over the layer of Intel's neural compressor."""

    over = ("PatchedLinear",)


class TorchaoLoraLinear(metaclass=_OverTorchao):
    """Over a linear layer whose weight is torchao's."""
