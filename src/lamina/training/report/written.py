"""How numbers are written for people."""

from __future__ import annotations

import math

from lamina import amounts

MINUS, UNKNOWN = "\N{MINUS SIGN}", "–"


def value(number: float | None) -> str:
    """A score: three decimals, or three digits where that is more, or tells more."""
    if number is None:
        return UNKNOWN
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "∞" if number > 0 else f"{MINUS}∞"
    size = abs(number)
    if size >= 100_000 or 0 < size < 0.001:
        return f"{number:.2e}".replace("-", MINUS)
    return f"{number:,.{_decimals(number)}f}".replace("-", MINUS)


def signed(number: float | None, like: float | None = None) -> str:
    """A change: with its sign, and without one if it is none.

    Args:
        number: the change.
        like: a value that it is a change of, whose decimals it has; if not given, its own.
    """
    if number is None or math.isnan(number):
        return UNKNOWN
    fixed = like is not None and math.isfinite(number) and 0.001 <= abs(like) < 100_000
    told = f"{number:,.{_decimals(like)}f}" if fixed and like is not None else value(number)
    told = told.replace("-", MINUS)
    if not any(digit in told for digit in "123456789∞"):
        return told.removeprefix(MINUS)
    return told if number < 0 else f"+{told}"


def _decimals(number: float) -> int:
    size = abs(number)
    return 1 if size >= 1_000 else 2 if size >= 100 else 3


def share(part: float | None, digits: int = 1) -> str:
    """A share of something, in per cent."""
    if part is None or math.isnan(part):
        return UNKNOWN
    if math.isinf(part):
        return "∞"
    return f"{100 * part:.{digits}f}\N{NARROW NO-BREAK SPACE}%".replace("-", MINUS)


def span(seconds: float) -> str:
    """A span of time: `4.2 s`, `3:20 min`, `2:05 h`."""
    return amounts.duration(seconds) if seconds else UNKNOWN


def size(count: float | None) -> str:
    """Bytes in the unit that suits them: `52.1 KiB`."""
    return UNKNOWN if count is None else amounts.size(count)


def short(count: float | None) -> str:
    """A large number in three digits: `135M`."""
    return UNKNOWN if count is None else amounts.short(count)


def whole(count: int | None) -> str:
    """An integer with its thousands apart."""
    return UNKNOWN if count is None else f"{count:,}"


def ranks(least_and_most: tuple[int, int]) -> str:
    """`8`, or `4–8` where modules differ."""
    least, most = least_and_most
    return str(least) if least == most else f"{least}–{most}"


def joined(names: list[str], most: int = 3) -> str:
    """`a`, `a and b`, `a, b, c and 2 more`."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""
