"""How a layer is quantised, by peft's names; reading and writing is `lamina.engine.weights`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lamina.engine.weights import weight_of
from lamina.errors import FoldError


class QuantizationBackend:
    """A kind of quantised weight.

    Attributes:
        backend_name: what it is called in a model's status.
        supports_merge: whether adapters can be folded into it.
    """

    backend_name = ""
    supports_merge = True

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """The layer's weight, dense."""
        return weight_of(base_layer).read()

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        """Quantise a weight anew, into an adapted layer's base."""
        weight_of(peft_layer.get_base_layer()).swap(weight_data)

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        """What the base layer gave, to be added to."""
        return x


class Bnb8bitBackend(QuantizationBackend):
    """bitsandbytes, 8 bits."""

    backend_name = "bnb 8bit"


class Bnb4bitBackend(QuantizationBackend):
    """bitsandbytes, 4 bits."""

    backend_name = "bnb 4bit"


class HqqBackend(QuantizationBackend):
    """HQQ."""

    backend_name = "hqq"


class TorchaoBackend(QuantizationBackend):
    """Torchao.

    Args:
        get_apply_tensor_subclass: what gives the settings to quantise by.
    """

    backend_name = "torchao"

    def __init__(self, get_apply_tensor_subclass: Callable[[], Any] | None = None) -> None:
        self.get_apply_tensor_subclass = get_apply_tensor_subclass


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """A weight that can be multiplied by, and nothing else."""

    supports_merge = False

    def __init__(self, backend_name: str = "") -> None:
        self.backend_name = backend_name

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """Not for this kind."""
        raise FoldError(f"Weights of {self.backend_name} can't be read.")

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        """Not for this kind."""
        raise FoldError(f"Weights of {self.backend_name} can't be written.")


_BY_WEIGHT: dict[str, type[QuantizationBackend]] = {
    "Bnb4bitWeight": Bnb4bitBackend,
    "Bnb8bitWeight": Bnb8bitBackend,
    "HqqWeight": HqqBackend,
    "TorchaoWeight": TorchaoBackend,
}
_BY_LAYER = {
    "QuantizedLinear": "aqlm",
    "EetqLinear": "eetq",
    "BaseQuantLinear": "gptq",
    "PatchedLinear": "inc",
    "TransformerEngineBaseModule": "te",
}


def resolve_quantization_backend(
    base_layer: nn.Module, **kwargs: Any
) -> QuantizationBackend | None:
    """How a layer is quantised; None if it isn't."""
    for kind in type(base_layer).__mro__:
        if kind.__name__ in _BY_LAYER:
            return ForwardOnlyQuantizationBackend(_BY_LAYER[kind.__name__])
    if next(base_layer.parameters(recurse=False), None) is None and not hasattr(base_layer, "W_q"):
        return None
    found = _BY_WEIGHT.get(type(weight_of(base_layer)).__name__)
    if found is TorchaoBackend:
        return TorchaoBackend(kwargs.get("get_apply_tensor_subclass"))
    return None if found is None else found()


def quantization_extra_repr(module: Any) -> str:
    """A layer's settings for `repr`, with how it is quantised."""
    backend = getattr(module, "quantization_backend", None)
    parts = [nn.Module.extra_repr(module)]
    if backend is not None:
        parts.append(f"quantization_backend='{backend.backend_name}'")
    return ", ".join(part for part in parts if part)


def get_quantization_kwargs(model: Any) -> dict[str, Any]:
    """What a model knows of how it was quantised."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    name = "get_apply_tensor_subclass"
    return {name: getattr(config, name)} if hasattr(config, name) else {}
