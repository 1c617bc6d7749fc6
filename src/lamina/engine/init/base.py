"""What an initialisation is, and what it may ask of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lamina.engine.weights import BaseWeight


class Begun(Protocol):
    """A layer whose adapter is about to begin."""

    # "linear", "embedding", "conv" ...
    kind: str
    # The layer that is adapted; preprocessing leaves on it what the initialisation needs.
    base_layer: Any
    # adapter -> `lamina.engine.layers.LayerAdapter`.
    records: dict[str, Any]

    @property
    def is_embedding(self) -> bool:
        """Whether its input are rows to look up."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r x in) and B (out x r) of an adapter, to be written into."""

    def tensors(self, name: str) -> Mapping[str, torch.Tensor]:
        """An adapter's parameters by their names on disk, e.g. `lora_A.weight`."""

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A`, shaped like the base's weight, summed in at least fp32."""

    def displace(self, adapter: str, becomes: torch.Tensor | None = None) -> None:
        """Take the adapter's update out of the base's weight, or set the weight to `becomes`."""

    @property
    def weight_view(self) -> BaseWeight:
        """The base's weight, to be read and written."""


class Numbers(Protocol):
    """An adapter's numbers in a layer, as far as an initialisation asks for them."""

    @property
    def r(self) -> int:
        """Its rank."""

    @property
    def scaling(self) -> float:
        """What its update is multiplied by."""

    @property
    def config(self) -> Any:
        """The config that it is made from."""


WhyNot = Callable[[str, nn.Module, Numbers], "Fault | None"]


@dataclass(frozen=True)
class Fault:
    """Why an initialisation can't be used.

    Attributes:
        reason: what is wrong, as a sentence of its own.
        cure: the call that mends it.
    """

    reason: str
    cure: str


def _nothing(kind: str, base: nn.Module, record: Numbers) -> Fault | None:
    return None


@dataclass(frozen=True)
class Initialisation:
    """How the factors of a new adapter begin.

    Attributes:
        begin: fills the factors of an adapter of a layer in place.
        changes_base: whether it also changes the base's weight; then an adapter that began so
            needs the same change wherever it is loaded, or has to be converted when it is saved.
        kinds: the kinds of layers that it is made for.
        why_not: None if a layer (its kind, its base, the adapter's numbers there) can begin so,
            else the fault; asked before anything is changed.
        low_rank: with `changes_base`, whether the change is the update that the adapter begins
            with, so that an exact conversion exists.
    """

    begin: Callable[[Begun, str], None]
    changes_base: bool = False
    kinds: tuple[str, ...] = ("linear", "embedding", "conv", "experts", "attention")
    why_not: WhyNot = _nothing
    low_rank: bool = True
