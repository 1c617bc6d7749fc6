"""A base at hand beside the one that a chain was trained on, by its weights."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.record import StageRecord
from lamina.checkpoint.sketch import Likeness, Over, compare
from lamina.checkpoint.sketch.memory import ModelWeights
from lamina.engine.compose import Factors
from lamina.errors import LaminaError, MismatchWarning, escaped
from lamina.stages.lamination import Chain, take_apart

if TYPE_CHECKING:
    from lamina.checkpoint.sketch.folded import Update, Updates
    from lamina.checkpoint.sketch.stored import Floats, Positions


def base_likeness(
    record: StageRecord,
    base: nn.Module,
    updates: Updates | None = None,
    *,
    heads: Collection[str] = (),
) -> Likeness | None:
    """What differs between a base and the recorded one; None if there is no sketch on record.

    Args:
        record: of the chain that is to lie over the base.
        base: the base, adapted or not.
        updates: what the chain adds, see `updates_in`.
        heads: modules that a stage to come trains whole, in place of the recorded head.
    """
    recorded = record.newest.base
    if recorded.sketch is None:
        return None
    here = getattr(base, "name_or_path", None) or None
    return compare(
        recorded.sketch,
        ModelWeights(base),
        over(record, updates, heads),
        name=recorded.name_or_path,
        here=here,
    )


def tell(source: str, remarks: Iterable[str], stacklevel: int) -> None:
    """Warn of what is not just as on record, and may be meant."""
    for remark in remarks:
        # What is said has names from files in it.
        said = escaped(f"{source}: {remark}.")
        warnings.warn(said, MismatchWarning, stacklevel=stacklevel + 1)


def over(record: StageRecord, updates: Updates | None = None, heads: Collection[str] = ()) -> Over:
    """What a chain changes in its base, told by its record."""
    return Over(
        targets={module for lamina in record.laminae for module in lamina.ranks},
        replaced=(*record.saved_modules, *record.biases),
        rows={
            f"{table}.weight": {row for rows in stages.values() for row in rows}
            for table, stages in record.token_rows.items()
        },
        heads=heads,
        updates=updates,
    )


def updates_in_file(file: AdapterFile) -> dict[str, Update]:
    """What the stages in a file add, as far as it can be told; see `updates_in`."""
    try:
        return updates_in(take_apart(file))
    except LaminaError:
        return {}


def updates_in(chain: Chain) -> dict[str, Update]:
    """What the first stage adds, the first two, and so on: in words -> how much at which place."""
    parts = chain.parts
    if not all(part.is_sum for part in parts):
        return {}
    found = {}
    for end in range(1, len(parts) + 1):
        names = " and ".join(repr(part.lamina.stage) for part in parts[:end])
        label = "the adapter" if end == len(parts) else f"stage {names}"
        found[label] = _update([part.factors for part in parts[:end]])
    return found


def _update(parts: Sequence[Mapping[str, Factors]]) -> Update:
    def added(module: str, shape: tuple[int, ...], positions: Positions) -> list[Floats] | None:
        factors = [part[module] for part in parts if module in part]
        if len(shape) != 2 or any(each.A.dim() != 2 for each in factors):
            return None
        row, column = np.unravel_index(positions, shape)
        # Conv1D and embeddings are stored the other way round.
        ways = [(row, column), (column, row)]
        sizes = [shape, shape[::-1]]
        return [
            sum((_at(each, *way) for each in factors), np.zeros(len(positions), np.float32))
            for way, size in zip(ways, sizes, strict=True)
            if all((each.B.shape[0], each.A.shape[1]) == size for each in factors)
        ]

    return added


def _at(factors: Factors, row: Positions, column: Positions) -> Floats:
    """`scaling * B @ A` at some places."""
    b = factors.B[row].float().cpu().numpy()
    a = factors.A[:, column].float().cpu().numpy()
    values: Floats = (factors.scaling * (b * a.T).sum(axis=1)).astype(np.float32)
    return values
