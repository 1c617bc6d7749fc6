"""Names or regular expressions -> numbers: which rank and alpha a module gets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol


class Numbers(Protocol):
    """The fields of a config that say so."""

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def matching(patterns: Iterable[str], name: str) -> list[str]:
    """The patterns that mean the module `name`: its end, or a regular expression for its end."""
    return [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)]


def first_match(table: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that means the module, else `default`."""
    found = matching(table, name)
    return table[found[0]] if found else default


def numbers(config: Numbers, name: str) -> tuple[int, float]:
    """(r, lora_alpha) that a config gives the module of that plain name."""
    return (
        int(first_match(config.rank_pattern, name, config.r)),
        first_match(config.alpha_pattern, name, config.lora_alpha),
    )
