"""How a base layer's weight is read and written, whatever it is made of.

`weight_of` picks the first registered kind that recognises a module; what nobody recognises is
opaque: it trains and infers through its own forward, and can't be folded into.
"""

from __future__ import annotations

from torch import nn

from lamina.engine.weights.base import BaseWeight
from lamina.engine.weights.bnb import Bnb4bitWeight, Bnb8bitWeight
from lamina.engine.weights.dense import DenseWeight
from lamina.engine.weights.gathered import GatheredWeight
from lamina.engine.weights.hqq import HqqWeight
from lamina.engine.weights.opaque import OpaqueWeight
from lamina.engine.weights.torchao import TorchaoWeight

__all__ = ["BaseWeight", "DenseWeight", "OpaqueWeight", "register", "weight_of"]

_KINDS: list[type[BaseWeight]] = [
    DenseWeight,
    Bnb4bitWeight,
    Bnb8bitWeight,
    TorchaoWeight,
    HqqWeight,
    GatheredWeight,
]


def register(kind: type[BaseWeight]) -> type[BaseWeight]:
    """Let `kind` be asked about modules, before those registered earlier. Usable as decorator."""
    _KINDS.insert(0, kind)
    return kind


def weight_of(layer: nn.Module) -> BaseWeight:
    """The weight of a base layer."""
    kind = next((kind for kind in _KINDS if kind.recognises(layer)), OpaqueWeight)
    return kind(layer)
