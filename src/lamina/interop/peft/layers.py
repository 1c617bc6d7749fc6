"""The layers of quantisers by peft's names: Lamina has one `Linear` for all of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from lamina.engine.layers import Linear as NativeLinear
from lamina.engine.weights import weight_of
from lamina.interop.peft.kinds import Linear
from lamina.interop.peft.layer_numbers import LayerClass


class _Over(LayerClass):
    """The metaclass of a class that adapted layers over a certain base layer are instances of."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if "over" not in cls.__dict__:
            # Derived from by somebody: then it's itself.
            return super().__instancecheck__(instance)
        return isinstance(instance, NativeLinear) and cls._is_base(instance.get_base_layer())

    def _is_base(cls, base: nn.Module) -> bool:
        return any(kind.__name__ in cls.__dict__["over"] for kind in type(base).__mro__)


class _OverTorchao(_Over):
    """Torchao keeps the layer and changes the class of its weight."""

    def _is_base(cls, base: nn.Module) -> bool:
        return type(weight_of(base)).__name__ == "TorchaoWeight"


class Linear4bit(Linear, metaclass=_Over):
    """Over bitsandbytes' 4-bit layer."""

    over = ("Linear4bit",)


class Linear8bitLt(Linear, metaclass=_Over):
    """Over bitsandbytes' 8-bit layer."""

    over = ("Linear8bitLt",)


class HqqLoraLinear(Linear, metaclass=_Over):
    """Over HQQ's layer."""

    over = ("HQQLinear",)


class GPTQLoraLinear(Linear, metaclass=_Over):
    """Over GPTQModel's layers."""

    over = ("BaseQuantLinear",)


class AwqLoraLinear(Linear, metaclass=_Over):
    """Over GPTQModel's layers for AWQ."""

    over = ("AwqGEMMQuantLinear", "WQLinear_GEMM")


class AqlmLoraLinear(Linear, metaclass=_Over):
    """Over AQLM's layer."""

    over = ("QuantizedLinear",)


class EetqLoraLinear(Linear, metaclass=_Over):
    """Over EETQ's layer."""

    over = ("EetqLinear",)


class IncLoraLinear(Linear, metaclass=_Over):
    """Over the layer of Intel's neural compressor."""

    over = ("PatchedLinear",)


class TorchaoLoraLinear(Linear, metaclass=_OverTorchao):
    """Over a linear layer whose weight is torchao's."""

    over = ()


class TeLinear(Linear, metaclass=_Over):
    """Over TransformerEngine's linear layer."""

    over = ("TransformerEngineBaseModule",)


class LoraParallelLinear(Linear, metaclass=_Over):
    """Over Megatron's layers, which are split over processes."""

    over = ("ColumnParallelLinear", "RowParallelLinear")
