"""Checks of the values: what is broken, and what was never trained."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lamina.checkpoint.doctor.evidence import StoredTensor
from lamina.checkpoint.doctor.findings import Finding
from lamina.checkpoint.doctor.measure import Measures, Pair
from lamina.checkpoint.doctor.registry import check
from lamina.checkpoint.doctor.spectrum import (
    ranks_for,
    repeated_ranks,
    singular_values,
    update_norm,
)
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.shapes import kind_of

_FP16_MOST = 65504.0
# A rank that is so much smaller than the largest of its module does nothing.
_DEAD = 1e-6
# A module whose update is so many times that of its like.
_OUTLIER = 100.0
_LEAST_PEERS = 4
_SAME = 0.9999
# The part of the sum of squares that the ranks in use hold.
_SHARE = 0.9999
_NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3")


@check
def unread(measures: Measures) -> Iterator[Finding]:
    """Whether the values can be read."""
    if measures.unread:
        what = "Tensors can't be read from their file"
        cure = "copy, download or save the file again"
        yield Finding("error", "file-unreadable", what, measures.unread, cure)


@check
def not_finite(tensors: Mapping[str, StoredTensor], measures: Measures) -> Iterator[Finding]:
    """NaN and infinity."""
    bad = {tensors[name].key: v for name, v in measures.values.items() if not v.finite}
    if bad:
        nan = sum(each.nan for each in bad.values())
        infinite = sum(each.infinite for each in bad.values())
        told = [f"{n:,} {kind}" for n, kind in ((nan, "NaN"), (infinite, "infinite")) if n]
        what = f"Entries are no numbers: {' and '.join(told)}"
        cure = "training diverged or a save was torn: take an earlier checkpoint-N, and lower the "
        cure += "learning rate or train in bfloat16"
        yield Finding("error", "not-finite", what, tuple(bad), cure)


@check
def dtypes(tensors: Mapping[str, StoredTensor], contents: Contents) -> Iterator[Finding]:
    """The dtypes of the tensors."""
    factors = {key for each in contents.factors for key in each.keys}
    whole = {t.key: t.dtype for n, t in tensors.items() if n in factors and t.dtype not in _NUMBERS}
    if whole:
        kinds = ", ".join(sorted({*whole.values()}))
        what = f"Factors are stored as {kinds}, not as floating-point numbers"
        yield Finding("error", "dtype-unusable", what, tuple(whole), "save it unquantised")
    small = tuple(t.key for t in tensors.values() if t.dtype.startswith("F8_"))
    if small:
        what = "Tensors are stored in float8, which few readers take and which is coarse"
        cure = "`lamina export DIR -o OUT --for peft --dtype bfloat16`"
        yield Finding("warning", "dtype-float8", what, small, cure)
    wide = tuple(t.key for t in tensors.values() if t.dtype == "F64")
    if wide:
        what = "Tensors are stored in float64: twice as large, and some programs refuse"
        cure = "`lamina export DIR -o OUT --for peft --dtype float32`"
        yield Finding("note", "dtype-float64", what, wide, cure)
    mixed = tuple(
        f"{each.module}: {a.dtype} and {b.dtype}"
        for each in contents.factors
        for a, b in [tuple(tensors[key] for key in each.keys)]
        if a.dtype != b.dtype
    )
    if mixed:
        what = "A and B have different dtypes"
        cure = "fine for PEFT and Lamina; `lamina export DIR -o OUT --for peft --dtype float32` "
        cure += "writes one dtype"
        yield Finding("note", "dtype-mixed", what, mixed, cure)


@check
def half_range(tensors: Mapping[str, StoredTensor], measures: Measures) -> Iterator[Finding]:
    """Values beyond float16."""
    large = {
        tensors[name].key: each.largest
        for name, each in measures.values.items()
        if each.largest > _FP16_MOST and tensors[name].dtype != "F16"
    }
    if large:
        what = f"There are values up to {max(large.values()):.3g}, which become "
        cure = "serve and merge it in bfloat16 or float32"
        yield Finding("note", "over-float16", f"{what}infinite in float16", tuple(large), cure)


# --- what was not trained ------------------------------------------------------------------------


@check
def no_effect(contents: Contents, measures: Measures) -> Iterator[Finding]:
    """Whether the adapter changes anything."""
    if _nothing_at_all(contents, measures):
        what = "The adapter changes nothing: in every module A or B is all zero"
        cure = "it was saved before training, or training had no gradient: train it; "
        cure += "lamina.begin_stage checks before the first step that something will learn"
        yield Finding("error", "no-effect", what, tuple(measures.pairs), cure)


def _nothing_at_all(contents: Contents, measures: Measures) -> bool:
    others = (contents.wholes, contents.biases, contents.rows, contents.of_methods)
    pairs = measures.pairs
    if any(others) or contents.biases_of_B or not pairs or len(pairs) < len(contents.factors):
        return False
    return all(_product(pair) == 0 for pair in pairs.values())


def _product(pair: Pair) -> float:
    if len(pair.norms_A) != len(pair.norms_B):
        return float(pair.norms_A.max(initial=0) * pair.norms_B.max(initial=0))
    return float(np.max(pair.norms_A * pair.norms_B, initial=0))


@check
def zero_factors(
    contents: Contents, measures: Measures, chain: Mapping[str, Mapping[str, slice]]
) -> Iterator[Finding]:
    """Factors that are all zero, stage by stage."""
    if _nothing_at_all(contents, measures):
        # Told as no-effect.
        return
    zero: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, pair in measures.pairs.items():
        for stage, ranks in _spans(chain.get(module, {}), pair).items():
            for side, norms in (("A", pair.norms_A), ("B", pair.norms_B)):
                if norms[ranks].size and not norms[ranks].any():
                    zero[side, stage].append(module)
    for (side, stage), modules in sorted(zero.items(), reverse=True):
        of = f" of stage {stage!r}" if stage else ""
        effect = "so that it changes nothing there" if side == "B" else "so that B never learns"
        what = f"{side}{of} is all zero, {effect}"
        cure = "if it was trained, these modules got no gradient: leave them out of "
        cure += "target_modules, or see why (not run, checkpointing without input gradients)"
        yield Finding("warning", f"zero-{side.lower()}", what, tuple(modules), cure)


def _spans(spans: Mapping[str, slice], pair: Pair) -> Mapping[str, slice]:
    """stage -> its ranks; all ranks where they are not in pairs, or there is one stage."""
    if len(spans) < 2 or len(pair.norms_A) != len(pair.norms_B):
        return {"": slice(None)}
    return spans


@check
def zero_tensors(
    tensors: Mapping[str, StoredTensor], contents: Contents, measures: Measures
) -> Iterator[Finding]:
    """Other tensors that are all zero."""
    watched = [name for names in contents.wholes.values() for name in names]
    names = [n for n in (*watched, *contents.rows) if n.endswith(("weight", "_delta"))]
    names += [name for name in contents.of_methods if name.endswith("magnitude_vector")]
    # Single layers may have lost all their ranks to others.
    diagonals = [name for name in contents.of_methods if name.endswith("lora_E")]
    if all(name in measures.values and measures.values[name].zero for name in diagonals):
        names += diagonals
    by_end = {name.removeprefix("base_model.model."): name for name in measures.values}
    found = [by_end.get(name.removeprefix("base_model.model."), "") for name in names]
    zero = tuple(tensors[n].key for n in found if n and measures.values[n].zero)
    if zero:
        what = "Tensors are all zero that can't be after training"
        cure = "they were sharded away when it was saved (ZeRO-3, FSDP): gather, and save again"
        yield Finding("warning", "zero-tensor", what, zero, cure)


@check
def zero_end(tensors: Mapping[str, StoredTensor], measures: Measures) -> Iterator[Finding]:
    """Whether the end of a file was never written."""
    tails: dict[str, list[str]] = {}
    for name in sorted(measures.values, key=lambda n: (tensors[n].file.name, tensors[n].begin)):
        tail = tails.setdefault(tensors[name].file.name, [])
        if measures.values[name].zero:
            tail.append(name)
        else:
            tail.clear()
    for file, names in tails.items():
        # A is never zero by itself, and a B that was not trained is no longer run.
        if len(names) >= 2 and any(".lora_A" in name for name in names):
            what = f"{file} ends with tensors that are all zero: a copy was cut off"
            where = tuple(tensors[name].key for name in names)
            cure = "copy, download or save the file again"
            yield Finding("error", "file-end-zero", what, where, cure)


@check
def dead_ranks(measures: Measures) -> Iterator[Finding]:
    """Ranks that do nothing beside the others of their module."""
    dead = {}
    for module, pair in measures.pairs.items():
        if len(pair.norms_A) == len(pair.norms_B):
            sizes = pair.norms_A * pair.norms_B
            count = int(np.count_nonzero(sizes <= _DEAD * sizes.max(initial=0)))
            if 0 < count < len(sizes):
                dead[module] = f"{module}: {count} of {len(sizes)}"
    if dead:
        what = "Some ranks do nothing: a row of A or a column of B is "
        cure = "harmless; `lamina export DIR -o OUT --for peft --rank N` leaves them out of a copy"
        yield Finding("note", "dead-ranks", f"{what}zero or nearly so", tuple(dead.values()), cure)


@check
def repeats(measures: Measures, contents: Contents) -> Iterator[Finding]:
    """Ranks that repeat others."""
    experts = {each.module for each in contents.factors if contents.is_parameter(each)}
    found = []
    for module, pair in measures.pairs.items():
        same = [] if module in experts else repeated_ranks(pair, _SAME)
        if same:
            found.append(
                f"{module}: rank {same[0][1]} is rank {same[0][0]} again, {len(same)} such"
            )
    if found:
        what = "Some ranks are others over again"
        cure = (
            "an adapter was put together with itself, or began with equal rows: its update counts "
        )
        cure += "double; take the parts apart (`lamina split DIR -o OUT`) and put each in once"
        yield Finding("warning", "ranks-repeated", what, tuple(found), cure)


@check
def unused_ranks(
    config: dict[str, Any], contents: Contents, measures: Measures
) -> Iterator[Finding]:
    """How many of the ranks the update uses."""
    if config.get("peft_type") == "ADALORA":
        return
    experts = {each.module for each in contents.factors if contents.is_parameter(each)}
    few = []
    for module, pair in measures.pairs.items():
        values = None if module in experts or len(pair.norms_A) < 8 else singular_values(pair)
        if values is not None and values.any():
            used = ranks_for(values, _SHARE)
            if used * 4 <= len(values):
                few.append((used, f"{module}: {used} of {len(values)}"))
    if few and len(few) * 2 > len(measures.pairs):
        most = max(used for used, _ in few)
        what = f"{most} ranks, or less, hold {_SHARE:.2%} of the update"
        cure = (
            f"`lamina export DIR -o OUT --for peft --rank {most}` makes a smaller copy, and says "
        )
        lines = tuple(line for _, line in few)
        yield Finding("note", "ranks-unused", what, lines, f"{cure}what is lost")


@check
def outliers(contents: Contents, measures: Measures) -> Iterator[Finding]:
    """Modules whose update is huge beside those of their kind."""
    norms: dict[str, dict[str, float]] = defaultdict(dict)
    for each in contents.factors:
        pair = measures.pairs.get(each.module)
        norm = update_norm(pair) if pair is not None else None
        if norm and not contents.is_parameter(each):
            norms[kind_of(each.module)][each.module] = norm * abs(contents.scaling(each))
    found = []
    for members in norms.values():
        usual = statistics.median(members.values())
        found += [
            f"{module}: norm {norm:.3g}, {norm / usual:.0f} times the median of its kind"
            for module, norm in members.items()
            if len(members) >= _LEAST_PEERS and norm > _OUTLIER * usual
        ]
    if found:
        what = f"Updates are over {_OUTLIER:.0f} times as large as those "
        cure = "training diverged there: take an earlier checkpoint-N, or lower the learning rate"
        yield Finding("warning", "norm-outlier", f"{what}of their like", tuple(found), cure)
