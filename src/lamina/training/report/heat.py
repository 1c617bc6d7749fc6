"""The matrix of stages by evals as it is shown: values, changes, and how strongly they colour."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lamina.training.evaluate.matrix import Cell, Matrix, Row, matrix_of
from lamina.training.evaluate.scores import Score
from lamina.training.report.facts import RunFacts, StageFacts
from lamina.training.report.written import share, signed, value

# Shares of the score before, from which on a change colours more strongly; below the first it is
# none. The same in every report, so that reports can be compared.
GRADES = (0.005, 0.02, 0.05, 0.10, 0.20)
# Two measurements further apart than this many standard errors differ.
_ERRORS = 1.96


@dataclass(frozen=True)
class ShownCell:
    """One eval after one stage.

    Attributes:
        value: the score.
        change: against the stage before.
        grade: -5 (worse by 20 % or more) to 5 (better by as much); None if there is nothing to
            compare.
        share: of the score before by which it is better.
        title: all of it in words.
        unsure: whether the change is within the errors of the two measurements.
        learnt_here: whether the eval is this stage's task.
        is_dead_end: whether the stage was refused.
    """

    value: str
    change: str
    grade: int | None
    share: float | None
    title: str
    unsure: bool
    learnt_here: bool
    is_dead_end: bool


@dataclass(frozen=True)
class ShownRow:
    """One eval.

    Attributes:
        row: what the figures are.
        cells: one per column.
        gain, forgetting, transfer: as they are written.
    """

    row: Row
    cells: tuple[ShownCell, ...]
    gain: str
    forgetting: str
    transfer: str


@dataclass(frozen=True)
class ShownMatrix:
    """All evals over all stages, those too that were refused.

    Attributes:
        columns: None for the base, then stages in the plan's order.
        rows: one per eval.
        matrix: of the chain alone.
    """

    columns: tuple[StageFacts | None, ...]
    rows: tuple[ShownRow, ...]
    matrix: Matrix


def shown_matrix(facts: RunFacts) -> ShownMatrix:
    """The matrix of a run: the chain, and beside it what was measured of dead ends."""
    matrix = matrix_of(facts.evaluation, facts.chain)
    aside = {
        each.name: matrix_of(facts.evaluation, _chain_to(facts, each))
        for each in facts.stages
        if not each.in_chain and each.judged is not None and each.judged.scores
    }
    stages = [each for each in facts.stages if each.in_chain or each.name in aside]
    rows = []
    for row in matrix.rows:
        place = {name: number for number, name in enumerate(matrix.columns)}
        cells = [_shown(row.cells[0], None, row, None)]
        for stage in stages:
            if stage.in_chain:
                number = place[stage.name]
                cells.append(_shown(row.cells[number], row.cells[number - 1], row, stage))
            else:
                cells.append(_aside(aside[stage.name], row, stage))
        rows.append(
            ShownRow(
                row,
                tuple(cells),
                gain=signed(row.gain, _value(row.cells[-1])),
                forgetting=signed(row.forgetting, _value(row.cells[-1])).removeprefix("+"),
                transfer=signed(row.transfer, _value(row.cells[-1])),
            )
        )
    return ShownMatrix((None, *stages), tuple(rows), matrix)


def better_by(before: Score | None, after: Score | None) -> float | None:
    """The share of `before` by which `after` is better; None if one isn't known."""
    if before is None or after is None:
        return None
    return -after.worse_by(before)


def is_unsure(before: Score | None, after: Score | None) -> bool:
    """Whether two scores differ by no more than the errors of their measurement, where known.

    These are errors of scores on other examples of the kind. On the very same ones, as here, a
    change may be real all the same: nothing is hidden for being unsure, it is only marked.
    """
    if before is None or after is None or before.error is None or after.error is None:
        return False
    distance = abs(after.value - before.value)
    return 0 < distance <= _ERRORS * math.hypot(before.error, after.error)


def is_change(before: Score | None, after: Score | None) -> bool:
    """Whether two scores differ by 0.5 % or more."""
    found = better_by(before, after)
    return found is not None and abs(found) >= GRADES[0]


def grade_of(better: float | None) -> int | None:
    """How strongly a change colours."""
    if better is None:
        return None
    strength = sum(abs(better) >= bound for bound in GRADES)
    return strength if better > 0 else -strength


def _value(cell: Cell) -> float | None:
    return cell.score.value if cell.score else None


def _chain_to(facts: RunFacts, stage: StageFacts) -> Sequence[str]:
    found = [stage.name]
    below = stage.built_on
    while below is not None:
        found.append(below)
        below = facts.stage(below).built_on
    return found[::-1]


def _aside(matrix: Matrix, row: Row, stage: StageFacts) -> ShownCell:
    found = next((each for each in matrix.rows if each.name == row.name), None)
    if found is None:
        return _shown(Cell(None), None, row, stage)
    return _shown(found.cells[-1], found.cells[-2], row, stage)


def _shown(cell: Cell, before: Cell | None, row: Row, stage: StageFacts | None) -> ShownCell:
    earlier = before.score if before else None
    better = better_by(earlier, cell.score)
    # Of a change that is none nobody asks whether it may be chance.
    unsure = bool(grade_of(better)) and is_unsure(earlier, cell.score)
    return ShownCell(
        value=value(cell.score.value if cell.score else None),
        change="" if cell.change is None else signed(cell.change, _value(cell)),
        grade=grade_of(better),
        share=better,
        title="\n".join(_told(cell, better, unsure)),
        unsure=unsure,
        learnt_here=stage is not None and stage.name == row.learnt_in,
        is_dead_end=stage is not None and stage.is_dead_end,
    )


def _told(cell: Cell, better: float | None, unsure: bool) -> Iterator[str]:
    score = cell.score
    if score is None:
        yield "not measured"
        return
    error = f" ± {value(score.error)}" if score.error is not None else ""
    yield f"{score.metric} {value(score.value)}{error}, on {score.examples:,} examples"
    if better is not None:
        way = "better" if better > 0 else "worse" if better < 0 else "as before"
        yield f"{share(abs(better))} {way} than the stage before" if better else way
    if unsure:
        yield "within the errors of the two measurements"
    if cell.from_base is not None:
        yield f"{signed(cell.from_base)} against the base, better being positive"
    for name, number in score.details.items():
        yield f"{name}: {value(number)}"
