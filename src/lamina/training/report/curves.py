"""What a stage's log says of its losses and its speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lamina.training.run.log import read_log

Point = tuple[int, float]
# More points than pixels tell nothing.
_MOST = 1_000


@dataclass(frozen=True)
class Curve:
    """The log of one stage.

    Attributes:
        train: (step, loss), at most 1,000 of them.
        held_out: likewise, on held-out data.
        broken: steps at which a loss was no finite number.
        lines: in the log.
        steps: the last step that is logged.
        tokens: that were trained on, as the trainer counts them; None if it doesn't.
        tokens_per_second: while it trained, evaluations included.
        memory: of the device, or of the process, at most; in bytes.
    """

    train: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()
    broken: tuple[int, ...] = ()
    lines: int = 0
    steps: int = 0
    tokens: int | None = None
    tokens_per_second: float | None = None
    memory: int | None = None


def curve_of(file: Path | None) -> Curve:
    """Read a log; an empty curve where there is none."""
    lines = (
        [line for line in read_log(file) if _number(line.get("step")) is not None] if file else []
    )
    if not lines:
        return Curve()
    tokens = [value for line in lines if (value := _number(line.get("num_tokens"))) is not None]
    memory = [value for line in lines if (value := _number(line.get("memory"))) is not None]
    broken = {
        int(line["step"])
        for line in lines
        for key in ("loss", "eval_loss")
        if key in line and _number(line[key]) is None
    }
    return Curve(
        train=_points(lines, "loss"),
        held_out=_points(lines, "eval_loss"),
        broken=tuple(sorted(broken)),
        lines=len(lines),
        steps=max(int(line["step"]) for line in lines),
        tokens=int(max(tokens)) if tokens else None,
        tokens_per_second=_speed(lines),
        memory=int(max(memory)) if memory else None,
    )


def smoothed(points: Sequence[Point], width: int) -> list[Point]:
    """The mean of each point and those up to `width` before and after it."""
    found = []
    for place, (step, _) in enumerate(points):
        near = points[max(0, place - width) : place + width + 1]
        found.append((step, sum(value for _, value in near) / len(near)))
    return found


def _points(lines: Iterable[dict[str, Any]], key: str) -> tuple[Point, ...]:
    found = [
        (int(line["step"]), value)
        for line in lines
        if (value := _number(line.get(key))) is not None
    ]
    if len(found) <= _MOST:
        return tuple(found)
    width = math.ceil(len(found) / _MOST)
    groups = [found[place : place + width] for place in range(0, len(found), width)]
    return tuple((group[-1][0], sum(v for _, v in group) / len(group)) for group in groups)


def _speed(lines: Sequence[dict[str, Any]]) -> float | None:
    """Clock and count begin anew where a stage goes on; what lies between is left out."""
    tokens = seconds = 0.0
    counted = [line for line in lines if _number(line.get("num_tokens")) is not None]
    for before, after in pairwise(counted):
        more = after["num_tokens"] - before["num_tokens"]
        took = (_number(after.get("seconds")) or 0.0) - (_number(before.get("seconds")) or 0.0)
        if more > 0 and took > 0:
            tokens, seconds = tokens + more, seconds + took
    return tokens / seconds if seconds else None


def _number(value: Any) -> float | None:
    """A finite number; None for anything else that a line may hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None
