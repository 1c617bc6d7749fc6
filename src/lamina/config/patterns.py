"""Names or regular expressions -> numbers: which rank and alpha a module gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from lamina.config.expressions import fullmatch, is_plain


class Numbers(Protocol):
    """The fields of a config that say so."""

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def matching(patterns: Iterable[str], name: str) -> list[str]:
    """The patterns that mean the module `name`: its end, or a regular expression for its end."""
    return [pattern for pattern in patterns if means(pattern, name)]


def means(pattern: str, name: str) -> bool:
    """Whether one pattern means the module `name`.

    Raises:
        ConfigError: it is no regular expression, or can't be matched in bounded time.
    """
    if not is_plain(pattern):
        return fullmatch(whole(pattern), name)
    # Tables of ranks have the names of all modules: these aren't worth a matcher each.
    start = len(name) - len(pattern)
    if start < 0 or (start and name[start - 1] != "."):
        return False
    return all(a in (b, ".") for a, b in zip(pattern, name[start:], strict=True))


def in_layers(pattern: str) -> str:
    """The expression whose group `lamina_index` is the number after a list of layers."""
    return rf"(?:^|.*?\.)(?:{pattern})\.(?P<lamina_index>\d+)\."


def whole(pattern: str) -> str:
    """The expression for whole names that a pattern for their ends stands for."""
    return rf"(.*\.)?({pattern})"


def first_match(table: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that means the module, else `default`."""
    return next((value for pattern, value in table.items() if means(pattern, name)), default)


def numbers(config: Numbers, name: str) -> tuple[int, float]:
    """(r, lora_alpha) that a config gives the module of that plain name."""
    return (
        int(first_match(config.rank_pattern, name, config.r)),
        first_match(config.alpha_pattern, name, config.lora_alpha),
    )
