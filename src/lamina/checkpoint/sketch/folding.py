"""Names of tensors as a few patterns: numbered ones folded, `layers.{0-31}.mlp.up_proj.weight`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from urllib.parse import quote, unquote

_RUNS = re.compile(r"\{([^{}]*)\}")
_RUN = re.compile(r"\d{1,7}(-\d{1,7})?")
_NUMBER = re.compile(r"0|[1-9]\d{0,6}")
# All that a name may have, but for braces, blanks and the percent sign.
_PLAIN = "".join(chr(c) for c in range(33, 127) if chr(c) not in "{}%")
Numbers = tuple[int, ...]


def fold(notes: Mapping[str, str]) -> tuple[str, ...]:
    """Name -> note, as patterns `NAME NOTE`; names fold together where their notes are the same."""
    groups: dict[tuple[tuple[str | None, ...], str], list[Numbers]] = {}
    for name, note in notes.items():
        parts = quote(name, safe=_PLAIN).split(".")
        template = tuple(None if _NUMBER.fullmatch(part) else part for part in parts)
        numbers = tuple(int(part) for part in parts if _NUMBER.fullmatch(part))
        groups.setdefault((template, note), []).append(numbers)
    return tuple(
        f"{_filled(template, factors)} {note}"
        for (template, note), numbers in groups.items()
        for factors in _products(numbers)
    )


def _products(tuples: Iterable[Numbers]) -> list[tuple[Numbers, ...]]:
    """A set of tuples as a union of products of sets."""
    tails: dict[int, set[Numbers]] = {}
    for each in tuples:
        if not each:
            return [()]
        tails.setdefault(each[0], set()).add(each[1:])
    alike: dict[frozenset[Numbers], list[int]] = {}
    for first in sorted(tails):
        alike.setdefault(frozenset(tails[first]), []).append(first)
    return [
        (tuple(firsts), *rest) for tail, firsts in alike.items() for rest in _products(sorted(tail))
    ]


def _filled(template: tuple[str | None, ...], factors: tuple[Numbers, ...]) -> str:
    left = iter(factors)
    return ".".join(_run(next(left)) if part is None else part for part in template)


def _run(numbers: Numbers) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def count(pattern: str) -> int:
    """How many names a folded name stands for, told without writing them out.

    Raises:
        ValueError: a run is not one.
    """
    return math.prod(
        sum(end - first + 1 for first, end in _bounds(run)) for run in _RUNS.findall(pattern)
    )


def unfold(pattern: str) -> Iterator[str]:
    """The names that a folded name stands for, the last number running fastest.

    Raises:
        ValueError: a run is not one.
    """
    pieces = _RUNS.split(pattern)
    texts = [unquote(piece) for piece in pieces[::2]]
    runs = [[n for a, b in _bounds(run) for n in range(a, b + 1)] for run in pieces[1::2]]
    for numbers in product(*runs):
        yield texts[0] + "".join(f"{n}{text}" for n, text in zip(numbers, texts[1:], strict=True))


def _bounds(run: str) -> Iterator[tuple[int, int]]:
    for part in run.split(","):
        if not _RUN.fullmatch(part):
            raise ValueError(f"{{{run[:40]}}} is not a run of numbers")
        first, _, end = part.partition("-")
        if end and int(end) < int(first):
            raise ValueError(f"{{{run[:40]}}} runs backwards")
        yield int(first), int(end or first)
