"""Whether what a base differs by is what an adapter adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from lamina.checkpoint.sketch.matching import STEP, Pair

if TYPE_CHECKING:
    from lamina.checkpoint.sketch.stored import Floats, Positions

    # (plain module name, shape of its weight, flat positions) -> what is added there; None if that
    # is not known. A weight that is stored the other way round may have it in two ways.
    Update: TypeAlias = Callable[[str, tuple[int, ...], Positions], list[Floats] | None]
    # What is folded in, in words -> its update; made only when it is asked for.
    Updates: TypeAlias = Callable[[], Mapping[str, Update]]

# Of the places where an update can be seen, so many have to agree.
_ENOUGH = 0.9


def folded(differing: Mapping[str, Pair], updates: Updates | None) -> str | Literal[False] | None:
    """Which of the updates the difference is; False if it is none of them, None if unknown."""
    seen = False
    for label, update in (updates() if updates else {}).items():
        agreeing = visible = 0
        for name, pair in differing.items():
            added = update(name.rpartition(".")[0], pair.shape, pair.positions)
            if added:
                told = [_agree(pair, each) for each in added]
                best = max(told, key=lambda counts: counts[0])
                agreeing, visible = agreeing + best[0], visible + best[1]
        seen |= visible > 0
        if visible and agreeing >= _ENOUGH * visible:
            return label
    return False if seen else None


def _agree(pair: Pair, added: Floats) -> tuple[int, int]:
    """(where it explains the difference, where it is large enough to be seen, or there is one)."""
    recorded, actual = pair.recorded.astype(np.float64), pair.actual.astype(np.float64)
    # Both were rounded, and the sum before it was.
    step = STEP * np.maximum(np.abs(recorded), np.abs(actual)) + 1e-9
    visible = (np.abs(added) > 2 * step) | (np.abs(actual - recorded) > step)
    agreeing = visible & (np.abs(actual - recorded - added) <= 2 * step)
    return int(agreeing.sum()), int(visible.sum())
