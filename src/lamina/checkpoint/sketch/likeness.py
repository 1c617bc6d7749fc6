"""What differs between the base on record and the one at hand: a verdict."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lamina.checkpoint.sketch import words
from lamina.checkpoint.sketch.folded import folded
from lamina.checkpoint.sketch.matching import Findings, correlation, match, module_of, within
from lamina.checkpoint.sketch.sampling import Weights
from lamina.checkpoint.sketch.stored import VERSION, Sample, samples
from lamina.errors import RecordError

if TYPE_CHECKING:
    from lamina.checkpoint.record import Sketch
    from lamina.checkpoint.sketch.folded import Updates

Verdict = Literal["same", "quantised", "head", "resized", "structure", "merged", "other", "unknown"]
# The same codes may be dequantised a little differently on another device.
_SAME_CODES = 0.9999


@dataclass(frozen=True)
class Likeness:
    """A base beside the one on record.

    Attributes:
        verdict: "same"; "quantised": the same but for what a quantiser rounds away; "head": the
            same but for its head; "resized": the same with more or fewer rows; "structure": the
            same weights with others, or without some; "merged": the adapter is folded in; "other":
            another model, or one that was trained on; "unknown": nothing could be compared.
        sentence: what differs, without a full stop, to go on after "base: ".
        correlation: of the values that differ, or are quantised; None if there are none.
        differing: names of the tensors with other values.
        ok: whether an adapter of the recorded base belongs on this one.
    """

    verdict: Verdict
    sentence: str
    correlation: float | None = None
    differing: tuple[str, ...] = ()
    ok: bool = True


@dataclass(frozen=True)
class Over:
    """An adapter that is to lie over the base.

    Attributes:
        targets: plain names of the modules that it updates.
        replaced: plain names of modules, or tensors, whose values it brings itself: what the base
            has there doesn't matter.
        rows: tensor -> rows of it that it brings itself.
        heads: plain names of modules that are trained whole in place of the recorded head: that
            the base has these, and not that one, is meant.
        updates: gives what it, or the first of its stages, add to a weight; asked only if the base
            differs in nothing but targets.
    """

    targets: Collection[str] = ()
    replaced: Collection[str] = ()
    heads: Collection[str] = ()
    rows: Mapping[str, Collection[int]] = field(default_factory=dict)
    updates: Updates | None = None


def compare(
    recorded: Sketch,
    weights: Weights,
    over: Over | None = None,
    *,
    name: str | None = None,
    here: str | None = None,
) -> Likeness:
    """Read the weights at hand where those on record were read, and tell what differs.

    Args:
        recorded: the sketch on record.
        weights: `ModelWeights(model)` or `FileWeights(directory)`.
        over: the adapter; without one, nothing is told of updates that are folded in.
        name: what the recorded base was loaded from.
        here: what the base at hand was loaded from.

    Raises:
        RecordError: the sketch is damaged.
    """
    base = f"{name!r}, the recorded base" if name else "the recorded base"
    this = repr(here) if here and here != name else "this"
    over = over or Over()
    if recorded.version != VERSION:
        said = f"can't be compared with {base}: a newer Lamina made its sketch"
        return Likeness("unknown", f"{this} {said}")
    found = _match(recorded, weights, over)
    if not weights.whole and (found.differing or found.reshaped or found.lost):
        # Only now is it worth to find out what transformers would do with these files.
        loaded = weights.as_loaded()
        found = found if loaded is None else _match(recorded, loaded, over)
    storage = recorded.quantization or "dense", weights.quantization or "dense"
    if storage[0] == storage[1] and (correlation(found.quantised) or 0.0) > _SAME_CODES:
        found.same += found.near
        found.near = []
    verdict, said = _verdict(found, base, over, storage)
    return Likeness(
        verdict,
        f"{this} {said}",
        correlation({**found.dense, **found.quantised}),
        tuple(found.differing),
        verdict in ("same", "quantised", "head", "unknown"),
    )


def _match(recorded: Sketch, weights: Weights, over: Over) -> Findings:
    return match(
        _samples(recorded),
        weights,
        halved=recorded.dtype == "float16",
        whole=recorded.whole,
        replaced=over.replaced,
        rows=over.rows,
    )


def _samples(recorded: Sketch) -> list[Sample]:
    try:
        return samples(recorded)
    except ValueError as error:
        raise RecordError(
            f"The sketch of the base in the stage record is damaged: {error}.",
            cure="pass allow_base_mismatch=True to go on without it, and save the stage again",
        ) from error


def _verdict(
    found: Findings, base: str, over: Over, storage: tuple[str, str]
) -> tuple[Verdict, str]:
    targeted = {*map(module_of, found.differing)} <= {*over.targets}
    if found.differing and targeted and not found.reshaped:
        return _updated(found, base, over)
    idle = found.compared > len(found.differing) and words.only_poolers(found.differing)
    if found.reshaped or (found.differing and not idle):
        return "other", words.other(found, base)
    if not found.compared and not found.hidden:
        if found.lost:
            return "unknown", f"can't be compared with {base}: its files name all weights otherwise"
        return "other", f"has no weight that {base} has by name and shape"
    verdict: Verdict = "same" if found.compared else "unknown"
    notes = []
    if found.near:
        verdict = "quantised"
        alike = correlation(found.quantised)
        notes.append(f"{storage[1]} instead of {storage[0]} (correlation {alike:.3f})")
    if found.differing:
        verdict = "head"
        notes.append(f"with a pooler that was initialised anew ({words.some(found.differing)})")
    if found.rows:
        verdict = "resized"
        notes.append(words.rows(found))
    if (found.missing or found.extra) and not _meant(found, over):
        is_head = verdict != "resized" and words.no_layers((*found.missing, *found.extra))
        verdict = "head" if is_head else "structure"
        notes.append(words.parts(found))
    return verdict, words.alike(found, base, notes)


def _meant(found: Findings, over: Over) -> bool:
    """Whether what is missing and what is there besides are an old head and a new one."""
    new, touched = set(over.heads), {*over.targets, *over.replaced}
    return (
        bool(found.extra)
        and all(within(name, new) for name in found.extra)
        and words.no_layers(found.missing)
        and not any(within(name, touched) for name in found.missing)
    )


def _updated(found: Findings, base: str, over: Over) -> tuple[Verdict, str]:
    """For a base that differs in targets of the adapter, and in nothing else."""
    where = words.share_of_targets(found, over.targets)
    label = folded(found.dense, over.updates)
    if label:
        return "merged", f"is {base} with {label} folded in already: {where}"
    if not words.related(found) and not {*found.same} - {*found.flat}:
        # Where the adapter targets all there is, another model differs in its targets too.
        return "other", words.other(found, base)
    if label is None:
        return "merged", f"is {base} with the adapter, or one like it, folded in already: {where}"
    return "other", f"is {base} with something else folded in, or trained on: {where}"
