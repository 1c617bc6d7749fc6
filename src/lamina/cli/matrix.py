"""Stages by evals, as a table: what each stage gained, and what it cost the others."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lamina.training.evaluate.matrix import Cell, Matrix, Row
from lamina.training.evaluate.scores import Score

# Metrics whose values are shares.
_SHARES = {"accuracy", "exact_match"}


def in_figures(score: Score, value: float, *, sign: bool = False) -> str:
    """A value of a score, or with `sign` a difference of such: shares in per cent."""
    plus = "+" if sign else ""
    if score.metric in _SHARES:
        return f"{100 * value:{plus}.1f}%"
    return f"{value:{plus}.3f}" if abs(value) < 1000 else f"{value:{plus}.3g}"


def print_matrix(out: Console, matrix: Matrix) -> None:
    """The table, and what it says in sum."""
    out.print(matrix_table(matrix))
    for metric, value in matrix.backward_transfer.items():
        score = next(_known(row) for row in matrix.rows if row.metric == metric)
        told = f"backward transfer, {metric}: {in_figures(score, value, sign=True)}"
        out.print(Text(f"{told} (better is positive)", style="dim"), soft_wrap=True)


def matrix_table(matrix: Matrix) -> Table:
    """A line per eval; in each stage's column the value, and how it changed: green is better."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    made.add_column(Text("eval"), no_wrap=True)
    made.add_column(Text("measures"), no_wrap=True, style="dim")
    for name in matrix.columns:
        made.add_column(Text(name), justify="right")
    made.add_column(Text("gain"), justify="right")
    made.add_column(Text("forgotten"), justify="right")
    for row in matrix.rows:
        made.add_row(*_cells(row))
    return made


def _cells(row: Row) -> Iterator[Text]:
    known = _known(row)
    yield Text(row.name)
    yield Text(row.metric)
    for cell in row.cells:
        yield _cell(cell)
    for value in (row.gain, row.forgetting):
        yield Text("" if value is None else in_figures(known, value, sign=value is row.gain))


def _cell(cell: Cell) -> Text:
    if cell.score is None:
        return Text("-", style="dim")
    value = in_figures(cell.score, cell.score.value)
    if cell.change is None or cell.gain is None:
        return Text(value)
    style = "green" if cell.gain > 0 else "red" if cell.gain < 0 else "dim"
    return Text.assemble(value, " ", (in_figures(cell.score, cell.change, sign=True), style))


def _known(row: Row) -> Score:
    return next(cell.score for cell in row.cells if cell.score)
