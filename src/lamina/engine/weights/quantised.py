"""What the weights of all quantisers have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from lamina.engine.weights.base import BaseWeight


class QuantisedWeight(BaseWeight):
    """A weight stored in few bits; what is folded in is rounded to them again."""

    @property
    @abstractmethod
    def quantised(self) -> str: ...

    @property
    def parameter(self) -> Any:
        """The parameter that holds the codes."""
        return self.layer._parameters["weight"]

    @property
    def why_not_writable(self) -> str | None:
        return "it is on the meta device" if self.parameter.is_meta else None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.parameter.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.parameter.dtype
        return dtype


def is_of(value: object, package: str, *names: str) -> bool:
    """Whether something is of a class of a package, which need not be installed to ask.

    Args:
        value: anything.
        package: the top-level package that defines the class.
        names: of the classes; none means any.
    """
    return any(
        kind.__module__.partition(".")[0] == package and (not names or kind.__name__ in names)
        for kind in type(value).__mro__
    )
