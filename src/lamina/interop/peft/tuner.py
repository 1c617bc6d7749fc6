"""The base classes of tuners and their layers, by peft's names."""

from __future__ import annotations

from typing import Any

from torch import nn

from lamina.engine.layers import LoraLayer
from lamina.interop.peft.standing import StandsFor
from lamina.model import LoraModel


class BaseTunerLayer(metaclass=StandsFor):
    """Every adapted layer is an instance of this."""

    native = LoraLayer


class BaseTuner(nn.Module, metaclass=StandsFor):
    """Every tuner is an instance of this."""

    native = LoraModel
    prefix: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


__all__ = ["BaseTuner", "BaseTunerLayer", "LoraModel"]
