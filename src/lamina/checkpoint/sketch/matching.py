"""Tensor by tensor: a sketch beside the weights that are at hand."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lamina.checkpoint.sketch.sampling import Tensor, Weights, rounded, some_quantised
from lamina.checkpoint.sketch.stored import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lamina.checkpoint.sketch.stored import Floats, Positions

# Relative distance of neighbouring bfloat16 numbers, at most.
STEP = 2.0**-7
# float16 has nothing between multiples of this, and nothing beyond the other.
_SMALLEST_HALF, _LARGEST_HALF = 2.0**-24, 65504.0
# Where all is alike but for what a quantiser rounds away.
_ALIKE = 0.8
# So many tensors may be tied, and so many are tried as what they are tied to.
_TWINS = 8


@dataclass(frozen=True)
class Pair:
    """Values of one tensor, there and here.

    Attributes:
        recorded: rounded to bfloat16.
        actual: rounded likewise.
        positions: where they are, counted through the recorded shape.
        shape: the recorded one.
    """

    recorded: Floats
    actual: Floats
    positions: Positions
    shape: tuple[int, ...]


@dataclass
class Findings:
    """What became of each recorded tensor, by its recorded name.

    Attributes:
        same: with the recorded values.
        flat: those of them of which all values are one, as a bias of zeros: they tell little.
        near: quantised here or there, and alike but for that.
        differing: with other values.
        unread: not among those that are looked at, or all the adapter's own.
        hidden: with values that can't be looked at, here or there.
        missing: not here, nor under another name.
        extra: here, and not on record.
        lost: not here, where files may have them under another name or in another form.
        rows: with another number of rows and the same values in those it shares: there, here.
        reshaped: with another shape altogether.
        quantised: values of tensors that are quantised here or there.
        dense: values of those of the others that differ.
    """

    same: list[str] = field(default_factory=list)
    flat: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    reshaped: list[str] = field(default_factory=list)
    quantised: dict[str, Pair] = field(default_factory=dict)
    dense: dict[str, Pair] = field(default_factory=dict)

    @property
    def compared(self) -> int:
        """Number of tensors whose values were looked at."""
        return len(self.same) + len(self.near) + len(self.differing)


def match(
    recorded: Iterable[Sample],
    weights: Weights,
    *,
    halved: bool,
    whole: bool,
    replaced: Collection[str] = (),
    rows: Mapping[str, Collection[int]] | None = None,
) -> Findings:
    """Look up every recorded tensor, and read it where the recorded values were.

    Args:
        recorded: what a sketch holds.
        weights: what is at hand.
        halved: whether the recorded values may have been rounded to float16.
        whole: whether the recorded tensors are all that the base has.
        replaced: modules, or tensors, whose values the adapter brings itself.
        rows: tensor -> rows that the adapter brings itself.
    """
    found = Findings()
    samples = [sample for sample in recorded if not within(sample.name, replaced)]
    names = aligned([sample.name for sample in samples], weights)
    tensors = weights.tensors
    chosen = _chosen(samples, names, tensors)
    wanted: dict[str, tuple[Sample, str, NDArray[np.bool_]]] = {}
    for sample in samples:
        actual = names.get(sample.name)
        if actual is None:
            found.missing.append(sample.name)
            continue
        tensor = tensors[actual]
        kept = _comparable(sample, tensor, found, (rows or {}).get(sample.name, ()))
        if kept is None:
            continue
        if kept.any() and actual in chosen:
            wanted[sample.name] = (sample, actual, kept)
        else:
            dark = not tensor.quantised and (sample.unread or not tensor.readable)
            (found.hidden if dark else found.unread).append(sample.name)
    _compare(wanted, weights, found, halved)
    known = {*names.values(), *(n for n in tensors if within(n, replaced))}
    found.extra = [name for name in tensors if name not in known]
    _resolve_ties(found, samples, weights)
    if not (whole and weights.whole):
        found.lost = found.missing
        found.missing, found.extra = [], []
    return found


def module_of(tensor: str) -> str:
    """The module that a tensor belongs to."""
    return tensor.rpartition(".")[0]


def within(name: str, outer: Collection[str]) -> bool:
    """Whether a tensor is one of these, or in one of these modules."""
    return any(name == each or name.startswith(f"{each}.") for each in outer)


def aligned(recorded: Iterable[str], weights: Weights) -> dict[str, str]:
    """Recorded name -> name here; all of them may have one more prefix, or one less."""
    here = {**{name: name for name in weights.tensors}, **weights.aliases}
    recorded = list(recorded)
    best: dict[str, str] = {name: here[name] for name in recorded if name in here}
    if 2 * len(best) >= len(recorded):
        return best
    for prefix in _prefixes(here):
        longer = {name: here[prefix + name] for name in recorded if prefix + name in here}
        best = max(best, longer, key=len)
    for prefix in _prefixes(recorded):
        cut = {name: name.removeprefix(prefix) for name in recorded if name.startswith(prefix)}
        shorter = {name: here[end] for name, end in cut.items() if end in here}
        best = max(best, shorter, key=len)
    return best


def _prefixes(names: Iterable[str]) -> list[str]:
    """What names begin with, up to three modules."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1]
        for end in range(1, min(3, len(parts)) + 1):
            found[".".join(parts[:end]) + "."] = None
    return [prefix for prefix in found if not any(c.isdigit() for c in prefix)]


def _chosen(
    samples: Iterable[Sample], names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> set[str]:
    """What is read: all that is dense, and some of what is quantised."""
    there = {
        names[s.name]: tensors[names[s.name]]
        for s in samples
        if s.name in names and s.positions is not None
    }
    dense = {name for name, each in there.items() if each.readable and not each.quantised}
    return dense | set(some_quantised(there))


def _comparable(
    sample: Sample, tensor: Tensor, found: Findings, own_rows: Collection[int]
) -> NDArray[np.bool_] | None:
    """Which recorded positions are here too, and belong to the base; None: the shape is another."""
    there, here = sample.shape, tensor.shape
    if tensor.dtype is None:
        # Of codes, nobody knows the shape of what they stand for.
        return np.zeros(1, np.bool_)
    if there != here:
        if len(there) != len(here) or not there or there[1:] != here[1:]:
            found.reshaped.append(sample.name)
            return None
        if not _brought(there[0], here[0], own_rows):
            found.rows[sample.name] = (there[0], here[0])
    if sample.positions is None:
        return np.zeros(1, np.bool_)
    kept: NDArray[np.bool_] = sample.positions < math.prod(here)
    if own_rows:
        row = sample.positions // max(1, math.prod(there[1:]))
        kept &= ~np.isin(row, list(own_rows))
    return kept


def _brought(there: int, here: int, own_rows: Collection[int]) -> bool:
    """Whether the adapter itself brings all rows that are on record, and not here."""
    # A record may claim any number of rows.
    return 0 < there - here <= len(own_rows) and {*range(here, there)} <= {*own_rows}


def _compare(
    wanted: Mapping[str, tuple[Sample, str, NDArray[np.bool_]]],
    weights: Weights,
    found: Findings,
    halved: bool,
) -> None:
    asked: dict[str, list[Positions]] = {}
    for sample, actual, kept in wanted.values():
        assert sample.positions is not None
        asked.setdefault(actual, []).append(sample.positions[kept])
    # Several that are on record may be tied here.
    read = weights.read({name: np.concatenate(each) for name, each in asked.items()})
    parts = {name: iter(_split(read[name], each)) for name, each in asked.items()}
    for sample, actual, kept in wanted.values():
        assert sample.values is not None
        assert sample.positions is not None
        tensor = weights.tensors[actual]
        here = rounded(next(parts[actual]))
        pair = Pair(sample.values[kept], here, sample.positions[kept], sample.shape)
        quantised = sample.quantised or tensor.quantised
        if quantised and (np.isnan(pair.recorded).all() or np.isnan(pair.actual).all()):
            found.hidden.append(sample.name)
        elif _equal(pair.recorded, pair.actual, halved or quantised or tensor.dtype == "float16"):
            found.same.append(sample.name)
            if np.ptp(pair.recorded) == 0:
                found.flat.append(sample.name)
        elif quantised:
            found.quantised[sample.name] = pair
        else:
            found.differing.append(sample.name)
            found.dense[sample.name] = pair
    alike = correlation(found.quantised) or 0.0
    (found.near if alike >= _ALIKE else found.differing).extend(found.quantised)


def _split(values: Floats, parts: Sequence[Positions]) -> list[Floats]:
    return np.split(values, np.cumsum([len(part) for part in parts])[:-1])


def _equal(recorded: Floats, actual: Floats, loosely: bool) -> bool:
    same = (recorded == actual) | (np.isnan(recorded) & np.isnan(actual))
    if loosely:
        # Rounding twice may end one step away.
        with np.errstate(invalid="ignore"):
            close = np.abs(recorded - actual) <= np.maximum(
                STEP * np.maximum(np.abs(recorded), np.abs(actual)), _SMALLEST_HALF
            )
        same |= close & np.isfinite(recorded) & np.isfinite(actual)
        beyond = np.minimum(np.abs(recorded), np.abs(actual)) >= _LARGEST_HALF
        same |= beyond & (np.sign(recorded) == np.sign(actual))
    return bool(same.all())


def correlation(pairs: Mapping[str, Pair]) -> float | None:
    """Of recorded and actual values, each tensor taken at its own recorded magnitude."""
    ours, theirs = [], []
    for pair in pairs.values():
        recorded, actual = pair.recorded.astype(np.float64), pair.actual.astype(np.float64)
        fine = np.isfinite(recorded) & np.isfinite(actual)
        size = float(np.sqrt(np.mean(recorded[fine] ** 2))) if fine.any() else 0.0
        if size > 0:
            ours.append(recorded[fine] / size)
            theirs.append(actual[fine] / size)
    if not ours:
        return None
    one, other = np.concatenate(ours), np.concatenate(theirs)
    norms = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / norms) if norms > 0 else 0.0


def _resolve_ties(found: Findings, samples: Iterable[Sample], weights: Weights) -> None:
    """A tied head may be there under its own name, or only as the embedding that it shares."""
    if len(found.missing) + len(found.extra) > _TWINS:
        return
    by_name = {sample.name: sample for sample in samples}
    for name in [n for n in found.missing if by_name[n].positions is not None]:
        twins = [n for n, t in weights.tensors.items() if t.shape == by_name[name].shape]
        if any(_holds(by_name[name], twin, weights) for twin in twins[:_TWINS]):
            found.missing.remove(name)
    for name in list(found.extra):
        shape = weights.tensors[name].shape
        like = [s for s in by_name.values() if s.shape == shape and s.positions is not None]
        if any(_holds(sample, name, weights) for sample in like[:_TWINS]):
            found.extra.remove(name)


def _holds(sample: Sample, name: str, weights: Weights) -> bool:
    tensor = weights.tensors[name]
    if len(tensor.shape) < 2 or not tensor.readable or tensor.quantised:
        return False
    assert sample.positions is not None
    assert sample.values is not None
    return _equal(sample.values, rounded(weights.read({name: sample.positions})[name]), True)
