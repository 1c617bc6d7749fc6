"""What every kind of base weight can be asked."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn


class BaseWeight(ABC):
    """A view of a base layer's weight; it holds no copy.

    Args:
        layer: the base layer, for example an `nn.Linear`.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @classmethod
    @abstractmethod
    def recognises(cls, layer: nn.Module) -> bool:
        """Whether this kind knows how to read the layer's weight."""

    @property
    @abstractmethod
    def why_not_writable(self) -> str | None:
        """None if updates can be folded in, else the reason, as the end of a sentence."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weight lies."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype it is stored in."""

    @abstractmethod
    def read(self) -> torch.Tensor:
        """The dense values as they are stored; not a copy, so don't write into it."""

    @abstractmethod
    def swap(self, values: torch.Tensor) -> torch.Tensor:
        """Store `values`, rounded once to the stored dtype, and return what was stored."""
