"""What an initialisation is, and what it may ask of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lamina.engine.weights import BaseWeight


class Begun(Protocol):
    """A layer whose adapter is about to begin."""

    # "linear", "embedding", "conv" ...
    kind: str
    # adapter -> `lamina.engine.layers.LayerAdapter`.
    records: dict[str, Any]

    @property
    def is_embedding(self) -> bool:
        """Whether its input are rows to look up."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r x in) and B (out x r) of an adapter, to be written into."""

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A`, shaped like the base's weight, summed in at least fp32."""

    @property
    def weight_view(self) -> BaseWeight:
        """The base's weight, to be read and written."""


@dataclass(frozen=True)
class Initialisation:
    """How the factors of a new adapter begin.

    Attributes:
        begin: fills the factors of an adapter of a layer in place.
        changes_base: whether it also changes the base's weight; then an adapter that began so
            needs the same change wherever it is loaded, or has to be converted when it is saved.
        kinds: the kinds of layers that it is made for.
    """

    begin: Callable[[Begun, str], None]
    changes_base: bool = False
    kinds: tuple[str, ...] = ("linear", "embedding", "conv", "experts", "attention")
