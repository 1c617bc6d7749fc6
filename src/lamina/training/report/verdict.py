"""What a run came to, in one sentence: what its end gained, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lamina.amounts import count_of
from lamina.training.evaluate.matrix import Matrix, Row
from lamina.training.evaluate.scores import Score
from lamina.training.report.facts import RunFacts
from lamina.training.report.heat import better_by, is_change, is_unsure
from lamina.training.report.written import joined, value


def sentence_of(facts: RunFacts, matrix: Matrix) -> str:
    """The sentence; where nothing was measured, or nothing is finished, it says so."""
    if facts.end is None:
        left = [each for each in facts.stages if each.standing != "rolled back"]
        return f"No stage is {'finished yet' if left else 'left'}{_stopped(facts)}."
    compared = [row for row in matrix.rows if row.cells[0].score and row.cells[-1].score]
    told = _measured(compared, facts.end.name) if compared else _unmeasured(facts)
    return f"{told}{_unfinished(facts)}."


def _unmeasured(facts: RunFacts) -> str:
    done = count_of(len(facts.chain), "stage")
    verb = "is" if len(facts.chain) == 1 else "are"
    if facts.evaluation.evals:
        return f"{done} {verb} finished; what was gained and what it cost isn't measured yet"
    return f"{done} {verb} finished; what was gained and what it cost isn't known without evals"


def _measured(rows: Sequence[Row], end: str) -> str:
    ends = [(row, *_ends(row)) for row in rows]
    better = [
        row for row, one, two in ends if is_change(one, two) and (better_by(one, two) or 0) > 0
    ]
    worse = [
        row for row, one, two in ends if is_change(one, two) and (better_by(one, two) or 0) < 0
    ]
    if better:
        gained = f"{end} is better than the base on {_of(better, rows)}"
    elif len(rows) == 1:
        gained = f"{end} is no better than the base on {rows[0].name}"
    else:
        gained = f"{end} is better than the base on none of the {len(rows)} evals"
    lost = [row for row in rows if row not in worse and _forgot(row)]
    if worse:
        gained += f", and worse on {joined([_change(row) for row in worse])}"
    if lost:
        told = joined([_forgotten(row) for row in lost])
        return f"{gained}; later stages gave back some of what was learnt: {told}"
    if worse:
        return gained
    if better:
        return f"{gained}; nothing that was measured got worse"
    return f"{gained}, and no worse{' on any' if len(rows) > 1 else ''}"


def _of(better: Sequence[Row], rows: Sequence[Row]) -> str:
    told = joined([_change(row) for row in better])
    if len(rows) == 1:
        return told
    count = "all" if len(better) == len(rows) else f"{len(better)} of"
    return f"{count} {len(rows)} evals: {told}"


def _change(row: Row) -> str:
    one, two = _ends(row)
    unsure = ", within the error" if is_unsure(one, two) else ""
    return f"{row.name} ({_metric(row)} {_way(one, two)}{unsure})"


def _forgot(row: Row) -> bool:
    return bool(row.forgetting) and is_change(_best(row), row.cells[-1].score)


def _forgotten(row: Row) -> str:
    best, last = _best(row), row.cells[-1].score
    return f"{row.name} ({_metric(row)} {_way(best, last)})" if last else row.name


def _metric(row: Row) -> str:
    return row.metric.replace("_", " ")


def _way(one: Score, two: Score) -> str:
    """From one value to another, on one line."""
    return f"{value(one.value)} → {value(two.value)}".replace(" ", "\N{NO-BREAK SPACE}")


def _ends(row: Row) -> tuple[Score, Score]:
    one, two = row.cells[0].score, row.cells[-1].score
    assert one is not None
    assert two is not None
    return one, two


def _best(row: Row) -> Score:
    known = [each.score for each in row.cells[:-1] if each.score and _is_number(each.score)]
    pick = max if row.higher_is_better else min
    return pick(known, key=lambda score: score.value)


def _is_number(score: Score) -> bool:
    return not math.isnan(score.value)


def _unfinished(facts: RunFacts) -> str:
    refused = [each.name for each in facts.stages if each.standing == "rolled back"]
    told = f"; {joined(refused)} cost more than allowed and was rolled back" if refused else ""
    if len(refused) > 1:
        told = told.replace("was rolled", "were rolled")
    waiting = [each.name for each in facts.stages if not each.in_chain and not each.is_dead_end]
    stopped = [each for each in facts.stages if each.standing == "refused"]
    if stopped:
        return f"{told}; {stopped[-1].name} cost more than allowed, which stopped the run"
    if waiting:
        verb = "is" if len(waiting) == 1 else "are"
        return f"{told}; the run isn't finished: {joined(waiting)} {verb} missing"
    return told


def _stopped(facts: RunFacts) -> str:
    for each in facts.stages:
        if each.standing in {"failed", "interrupted", "cut off", "refused"}:
            words = {"refused": "was refused by its gate", "cut off": "was cut off"}
            return f": {each.name} {words.get(each.standing, each.standing)}"
    refused = [each.name for each in facts.stages if each.standing == "rolled back"]
    verb = "was" if len(refused) == 1 else "were"
    return f": {joined(refused)} cost more than allowed and {verb} rolled back" if refused else ""
