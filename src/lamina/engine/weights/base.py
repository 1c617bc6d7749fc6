"""What every kind of base weight can be asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

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

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype that `read` gives."""
        return self.dtype

    @property
    def quantised(self) -> str | None:
        """The quantiser and its settings, for people to read; None for a dense weight."""
        return None

    @property
    def rounding(self) -> str | None:
        """The bits that folding rounds to, as a warning names them; None: not worth one."""
        return None

    @property
    def why_not_readable(self) -> str | None:
        """None if the dense values can be read, else the reason, as the end of a sentence."""
        return None

    # Whether `stops_gradients` may ever be true; asked once.
    may_stop_gradients = False

    @property
    def stops_gradients(self) -> bool:
        """Whether the layer's own forward, as it is now, lets no gradient through to its input."""
        return False

    @abstractmethod
    def read(self) -> torch.Tensor:
        """The dense values in a floating dtype; not a copy where they are stored so: don't write.

        Raises:
            FoldError: only the layer itself can read them.
        """

    @abstractmethod
    def swap(self, values: torch.Tensor) -> Any:
        """Store `values`, rounded once to what is stored, and return what was, for `restore`."""

    @abstractmethod
    def restore(self, stored: Any) -> None:
        """Put back, bit for bit, what `swap` returned."""

    @abstractmethod
    def values_of(self, stored: Any) -> torch.Tensor:
        """The dense values of what `swap` returned."""
