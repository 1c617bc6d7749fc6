"""Amounts in words: bytes, numbers, spans of time, counts."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in the unit that suits them: `52.1 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def short(count: float) -> str:
    """A large number in three digits: `135M`."""
    value = float(count)
    for unit in ("", "K", "M", "B"):
        if abs(value) < 999.5 or unit == "B":
            return f"{value:.3g}{unit}"
        value /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """A span of time: `4.2 s`, `3:20 min`, `2:05 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes}:{int(seconds % 60):02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def count_of(number: int, thing: str) -> str:
    """`1 module`, `2 modules`."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
