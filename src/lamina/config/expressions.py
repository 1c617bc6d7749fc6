"""Regular expressions of a config: checked, and matched in bounded time whoever wrote them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lamina.config.automaton import Automaton, parser, sre
from lamina.errors import ConfigError

# Characters; the whole names of three thousand modules have less.
_LONGEST = 200_000
# Of the number of ways in which a matcher may have to try, by twos. A `*` has as many as a name
# has places for it to end; few expressions have more than two of them, beside alternatives.
_PER_REPEAT = 6.0
_TRIED, _TRIED_WITHOUT_CHOICE = 16.0, 24.0
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)
_PLAIN = re.compile(r"[\w.-]*")

Matcher = Callable[[str], bool]


def why_not(pattern: str, *, with_groups: bool = False) -> str | None:
    """What keeps an expression from being used; None if nothing does.

    Args:
        pattern: the expression.
        with_groups: whether its groups are asked for, which only `re` itself can tell.
    """
    try:
        _compiled(pattern, with_groups)
    except ConfigError as error:
        return error.faults[0]
    return None


def fullmatch(pattern: str, name: str) -> bool:
    """Whether an expression means a whole name: `re.fullmatch`, in bounded time.

    Raises:
        ConfigError: it is no regular expression, or can't be matched in bounded time.
    """
    return _compiled(pattern)(name)


def is_plain(pattern: str) -> bool:
    """Whether an expression has nothing but characters and dots."""
    return bool(_PLAIN.fullmatch(pattern))


@lru_cache(maxsize=20_000)
def _compiled(pattern: str, with_groups: bool = False) -> Matcher:
    shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}..."
    try:
        with warnings.catch_warnings():
            # What a later Python will read differently.
            warnings.simplefilter("ignore")
            return _matcher(pattern, with_groups)
    except re.error as error:
        fault = f"{shown!r} is not a regular expression: {error}"
    except (OverflowError, RecursionError, ValueError) as error:
        fault = f"{shown!r} can't be matched in bounded time: {error or type(error).__name__}"
    raise ConfigError("A regular expression can't be used.", faults=[fault])


def _matcher(pattern: str, with_groups: bool) -> Matcher:
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has {len(pattern):,} characters")
    compiled = re.compile(pattern)
    ways = 0.0 if is_plain(pattern) else _ways(parser.parse(pattern))
    if ways > _TRIED and not with_groups:
        try:
            return Automaton(pattern).matches
        except ValueError as error:
            if ways > _TRIED_WITHOUT_CHOICE:
                raise ValueError(f"too many repetitions ({error})") from error
    if ways > _TRIED_WITHOUT_CHOICE:
        raise ValueError("too many repetitions")
    return lambda name: compiled.fullmatch(name) is not None


def _ways(items: Any) -> float:
    """Log2 of the ways in which a matcher that backtracks may try to match; an upper estimate."""
    return sum(_ways_of(operation, argument) for operation, argument in items)


def _ways_of(operation: Any, argument: Any) -> float:
    if operation is sre.BRANCH:
        ways = [_ways(each) for each in argument[1]]
        return math.log2(len(ways)) + max(ways)
    if operation in _REPEATS or str(operation) == "POSSESSIVE_REPEAT":
        least, most, inside = argument
        places = 2.0**_PER_REPEAT
        chosen: float = math.log2(min(most - least + 1, places))
        rounds: float = min(most, places)
        return chosen + _ways(inside) * rounds + _nested(inside, most)
    if isinstance(argument, (tuple, list)):
        # Groups, and what looks around.
        return sum(_ways(each) for each in argument if isinstance(each, parser.SubPattern))
    # An atomic group.
    return _ways(argument) if isinstance(argument, parser.SubPattern) else 0.0


def _nested(inside: Any, most: int) -> float:
    """What repeating makes worse: each round may take more or less of a name."""
    low, high = inside.getwidth()
    return _PER_REPEAT if most > 1 and low != high else 0.0
