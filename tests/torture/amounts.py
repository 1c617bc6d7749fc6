"""How much is done: little in `make test`, all of it in `make torture`."""

from __future__ import annotations

import os
from typing import TypeVar

FULL = bool(os.environ.get("LAMINA_TORTURE"))

T = TypeVar("T")


def amount(full: T, short: T) -> T:
    """One of the two."""
    return full if FULL else short


def each(count: int, short: int) -> range:
    """All of the numbers from 1 to `count`, or about `short` of them."""
    return range(1, count + 1, amount(1, max(1, count // short)))
