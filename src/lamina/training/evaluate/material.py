"""What all metrics have in common: data that is ready to be measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lamina.training.evaluate.scores import Score


@dataclass(frozen=True)
class Way:
    """How a model is measured.

    Attributes:
        head: what it answers with: logits of tokens, or one number.
        batch_size: examples in one forward.
    """

    head: Literal["language", "reward"]
    batch_size: int


class Material(Protocol):
    """Data of an eval and what is done with it."""

    @property
    def content(self) -> str:
        """What it is, in so far as scores depend on it."""

    def measure(self, model: Any, tokenizer: Any, way: Way) -> Score | None:
        """A score; None if a model of this kind can't be measured so."""


def share_error(share: float, count: int) -> float:
    """The standard error of a share p of n examples, sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / count)
