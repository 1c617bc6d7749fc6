"""What differs between the base on record and the one at hand, in one sentence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lamina.checkpoint.sketch.matching import Findings, correlation, match
from lamina.checkpoint.sketch.sampling import VERSION, Weights, samples

if TYPE_CHECKING:
    from lamina.checkpoint.record import Sketch

Verdict = Literal["same", "quantised", "head", "resized", "structure", "merged", "other", "unknown"]
# Weights of models that began as the same one are that much alike, others are not at all.
_RELATED = 0.9


@dataclass(frozen=True)
class Likeness:
    """A base beside the one on record.

    Attributes:
        verdict: "same"; "quantised": the same but for what a quantiser rounds away; "head": the
            same but for its head; "resized": the same with more or fewer rows; "structure": the
            same weights with others, or without some; "merged": differs in the adapter's targets
            alone; "other": another model; "unknown": nothing could be compared.
        sentence: what differs, to go on after "base: ".
        correlation: of the values that differ, or are quantised; None if there are none.
        differing: names of the tensors with other values.
        ok: whether an adapter of the recorded base belongs on this one.
    """

    verdict: Verdict
    sentence: str
    correlation: float | None = None
    differing: tuple[str, ...] = ()
    ok: bool = True


def compare(
    recorded: Sketch,
    weights: Weights,
    *,
    name: str | None = None,
    targets: Collection[str] = (),
    replaced: Collection[str] = (),
    rows: Mapping[str, Collection[int]] | None = None,
) -> Likeness:
    """Read the weights at hand where those on record were read, and tell what differs.

    Args:
        recorded: the sketch on record.
        weights: `ModelWeights(model)` or `FileWeights(directory)`.
        name: what the recorded base was loaded from.
        targets: plain names of the modules that the adapter updates, to know it when it is folded
            in already.
        replaced: plain names of modules, or tensors, whose values the adapter brings itself:
            what the base has there doesn't matter.
        rows: tensor -> rows of it that the adapter brings itself.
    """
    base = f"{name!r}, the recorded base" if name else "the recorded base"
    if recorded.version != VERSION:
        sentence = f"a newer Lamina made the sketch of {base}: its weights can't be compared"
        return Likeness("unknown", sentence)
    here = weights.quantization
    found = match(
        samples(recorded),
        weights,
        halved=recorded.dtype == "float16",
        replaced=replaced,
        rows=rows,
    )
    if here == recorded.quantization and (correlation(found.quantised) or 0.0) > 0.9999:
        # The same codes, dequantised on another device.
        found.same += found.near
        found.near = []
    return _verdict(found, base, targets, (recorded.quantization or "dense", here or "dense"))


def _verdict(
    found: Findings, base: str, targets: Collection[str], storage: tuple[str, str]
) -> Likeness:
    differing = tuple(found.differing)
    alike = correlation({**found.dense, **found.quantised})
    if differing and not found.reshaped and {*map(_module, differing)} <= {*targets}:
        return Likeness("merged", _merged(found, base, targets), alike, differing, False)
    if differing or found.reshaped:
        return Likeness("other", _other(found, base, alike), alike, differing, False)
    if not found.compared:
        return _unlooked(found, base)
    notes = []
    verdict: Verdict = "same"
    if found.near:
        verdict = "quantised"
        notes.append(f"{storage[1]} instead of {storage[0]} (correlation {alike:.3f})")
    if found.missing or found.extra:
        verdict = "head" if _is_head(found) else "structure"
        notes.append(_parts(found))
    if found.rows:
        verdict = "structure" if verdict == "structure" else "resized"
        notes.append(_rows(found))
    ok = verdict in ("same", "quantised", "head")
    if not notes:
        return Likeness("same", f"this has the weights of {base}")
    return Likeness(verdict, f"this is {base}, but {' and '.join(notes)}", alike, (), ok)


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _merged(found: Findings, base: str, targets: Collection[str]) -> str:
    looked = {*found.same, *found.near, *found.differing}
    aimed = [name for name in looked if name.endswith(".weight") and _module(name) in targets]
    changed = [name for name in aimed if name in found.differing]
    share = (
        f"all {len(aimed)}" if len(changed) == len(aimed) else f"{len(changed)} of the {len(aimed)}"
    )
    return (
        f"this is {base} with the adapter folded in already, or trained there otherwise: it "
        f"differs in {share} weights that the adapter targets, and in nothing else"
    )


def _other(found: Findings, base: str, alike: float | None) -> str:
    if not found.differing:
        return (
            f"this is another model than {base}: {len(found.reshaped)} of its weights have another "
            f"shape ({_some(found.reshaped)})"
        )
    share = f"{len(found.differing)} of {found.compared} sampled weights have other values"
    if len(found.differing) <= 3:
        share += f" ({_some(found.differing)})"
    if alike is not None and alike >= _RELATED:
        return f"this is a relative of {base}, but not it: {share} (correlation {alike:.4f})"
    return f"this is another model than {base}: {share}"


def _unlooked(found: Findings, base: str) -> Likeness:
    if not found.unread:
        sentence = f"this is another model than {base}: it has no weight of the same name and shape"
        return Likeness("other", sentence, ok=False)
    if found.missing or found.extra:
        sentence = f"this can't be {base}: {_parts(found)}"
        return Likeness("structure", sentence, ok=_is_head(found))
    if found.rows:
        return Likeness("resized", f"this may be {base}, but {_rows(found)}", ok=False)
    sentence = f"this has the names and shapes of {base}; its values can't be looked at"
    return Likeness("unknown", sentence)


def _is_head(found: Findings) -> bool:
    """Whether only such weights are missing, or more, that aren't part of any layer."""
    numbered = [n for n in (*found.missing, *found.extra) if any(p.isdigit() for p in n.split("."))]
    return not numbered


def _parts(found: Findings) -> str:
    parts = []
    if found.missing:
        parts.append(f"without {_some(found.missing)}")
    if found.extra:
        parts.append(f"with {_some(found.extra)} besides")
    return " and ".join(parts)


def _rows(found: Findings) -> str:
    there, here = next(iter(found.rows.values()))
    names = _some([*found.rows])
    if here > there:
        return f"with {here - there} more rows in {names} ({here} instead of {there})"
    return (
        f"with {there - here} rows fewer in {names} ({here} instead of {there}), so that what was "
        "trained on those is lost"
    )


def _some(names: Collection[str]) -> str:
    shown = list(names)[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
