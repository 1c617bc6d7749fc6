"""Stages by evals: what each stage gained, and what it cost the others; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lamina.training.evaluate.scores import Evaluation, Score

BASE = "base"


@dataclass(frozen=True)
class Cell:
    """One eval after one stage.

    Attributes:
        score: what was measured; None if it wasn't, or can't be.
        change: of the value against the stage before (the one that it was built on).
        gain: `change`, counted so that better is positive.
        from_base: the value's difference from the base's, counted likewise.
    """

    score: Score | None
    change: float | None = None
    gain: float | None = None
    from_base: float | None = None


@dataclass(frozen=True)
class Row:
    """One eval over all stages.

    Attributes:
        name: of the eval.
        metric: that it measures.
        higher_is_better: of its values.
        cells: the base's, then one per stage.
        learnt_in: the stage whose task it is: the plan's word, else that of the largest gain; None
            if it never got better.
        told: whether that is the plan's word.
        gain: of the end against the base, better being positive: G = s_T - s_0.
        forgetting: F = max over t < T of s_t, less s_T: what the best stage before the end knew and
            the end doesn't, 0 or more; the base counts as a stage. A score that is no number is
            left out before the end, and infinitely worse than any at it.
        transfer: s_T - s_k, k the stage that it was learnt in: what the stages after did to it; its
            mean over evals is the backward transfer. None if that is the last stage, or none.

    Sources: Chaudhry et al., "Riemannian walk" (ECCV 2018), of forgetting; Lopez-Paz and Ranzato,
    "Gradient episodic memory" (NeurIPS 2017), of backward transfer.
    """

    name: str
    metric: str
    higher_is_better: bool
    cells: tuple[Cell, ...]
    learnt_in: str | None
    told: bool
    gain: float | None
    forgetting: float | None
    transfer: float | None


@dataclass(frozen=True)
class Matrix:
    """All evals over all stages that the end is built on.

    Attributes:
        columns: "base", then the stages.
        rows: one per eval.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def backward_transfer(self) -> dict[str, float]:
        """Metric -> the mean of `transfer` over the evals that measure it."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            if row.transfer is not None:
                found.setdefault(row.metric, []).append(row.transfer)
        return {metric: sum(each) / len(each) for metric, each in found.items()}


def matrix_of(evaluation: Evaluation, stages: Sequence[str]) -> Matrix:
    """The matrix of a chain.

    Args:
        evaluation: what was measured.
        stages: the chain, oldest first; stages that were rolled back are no part of it.
    """
    measured = [evaluation.base, *(evaluation.stages.get(name) for name in stages)]
    rows = []
    for name in evaluation.evals:
        scores = [each.score(name) if each else None for each in measured]
        if any(scores):
            rows.append(_row(name, scores, stages, evaluation.learnt_in.get(name)))
    return Matrix((BASE, *stages), tuple(rows))


def _row(
    name: str, scores: Sequence[Score | None], stages: Sequence[str], asked: str | None
) -> Row:
    known = next(each for each in scores if each)
    sign = 1.0 if known.higher_is_better else -1.0
    good = [sign * each.value if each else None for each in scores]
    cells = tuple(
        Cell(
            score,
            change=_times(sign, _less(good, place, place - 1)),
            gain=_less(good, place, place - 1),
            from_base=_less(good, place, 0) if place else None,
        )
        for place, score in enumerate(scores)
    )
    told = asked in stages
    learnt = stages.index(asked) + 1 if asked is not None and told else _largest_gain(cells)
    end = len(scores) - 1
    return Row(
        name=name,
        metric=known.metric,
        higher_is_better=known.higher_is_better,
        cells=cells,
        learnt_in=stages[learnt - 1] if learnt else None,
        told=told,
        gain=_less(good, end, 0) if end else None,
        forgetting=_forgetting(good),
        transfer=_less(good, end, learnt) if learnt and learnt < end else None,
    )


def _largest_gain(cells: Sequence[Cell]) -> int:
    """The stage that an eval got better in most; 0 if in none."""
    gains = [cell.gain or 0.0 for cell in cells]
    best = max(range(len(gains)), key=gains.__getitem__)
    return best if gains[best] > 0 else 0


def _forgetting(good: Sequence[float | None]) -> float | None:
    earlier = [each for each in good[:-1] if each is not None and not math.isnan(each)]
    last = good[-1]
    if last is None or not earlier:
        return None
    best = max(earlier)
    if math.isnan(last):
        return math.inf
    return best - last if best > last else 0.0


def _less(good: Sequence[float | None], place: int, other: int) -> float | None:
    if place < 0 or other < 0:
        return None
    one, two = good[place], good[other]
    return None if one is None or two is None else one - two


def _times(sign: float, value: float | None) -> float | None:
    return None if value is None else sign * value
