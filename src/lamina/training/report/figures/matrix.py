"""The matrix of stages by evals as a picture."""

from __future__ import annotations

from typing import Any

from lamina.training.report.figures.theme import Theme, blank, label
from lamina.training.report.heat import GRADES, ShownCell, ShownMatrix

_CELL = (1.15, 0.52)
# How much of a colour each grade takes; the page's style sheet has the same.
STRENGTHS = (0.0, 0.12, 0.24, 0.38, 0.52, 0.66)
_LETTERS = 22


def matrix(shown: ShownMatrix, theme: Theme) -> Any:
    """A cell for each eval after each stage, coloured by the change against the stage before."""
    columns = ["base", *(each.name for each in shown.columns if each is not None)]
    extra = ["gain", "forgetting", "transfer"]
    width = (len(columns) + 0.85 * len(extra) + 1.9) * _CELL[0]
    figure = blank(width, (len(shown.rows) + 1.0) * _CELL[1] + 0.45)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-1.9, len(columns) + 0.85 * len(extra))
    axes.set_ylim(len(shown.rows) + 0.85, -0.65)
    for x, name in enumerate(columns):
        stage = shown.columns[x]
        _write(axes, x + 0.5, -0.3, name, theme.stage(stage.number if stage else None), bold=True)
    for place, name in enumerate(extra):
        _write(axes, len(columns) + 0.85 * place + 0.45, -0.3, name, theme.muted, size=8)
    for y, row in enumerate(shown.rows):
        arrow = "↑" if row.row.higher_is_better else "↓"
        axes.text(
            -1.9, y + 0.38, _short(row.row.name), color=theme.text, fontweight="bold",
            fontsize=9, va="center", parse_math=False,
        )  # fmt: skip
        axes.text(
            -1.9, y + 0.7, f"{_short(row.row.metric.replace('_', ' '))} {arrow}", color=theme.muted,
            fontsize=7.5, va="center", parse_math=False,
        )  # fmt: skip
        for x, cell in enumerate(row.cells):
            _cell(axes, x, y, cell, theme)
        for place, told in enumerate((row.gain, row.forgetting, row.transfer)):
            _write(axes, len(columns) + 0.85 * place + 0.45, y + 0.5, told, theme.text)
    _legend(axes, len(shown.rows) + 0.45, theme)
    return figure


def tint(grade: int | None, theme: Theme) -> tuple[str, float]:
    """Colour and opacity of a cell."""
    if not grade:
        return theme.rule, 0.35
    return (theme.better if grade > 0 else theme.worse), STRENGTHS[abs(grade)]


def _cell(axes: Any, x: int, y: int, cell: ShownCell, theme: Theme) -> None:
    from matplotlib.patches import FancyBboxPatch

    colour, opacity = tint(cell.grade, theme)
    axes.add_patch(
        FancyBboxPatch(
            (x + 0.06, y + 0.08),
            0.88,
            0.84,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=colour,
            alpha=opacity,
            linewidth=0,
        )
    )
    low = 0.36 if cell.change else 0.5
    if cell.is_dead_end:
        axes.plot([x + 0.28, x + 0.72], [y + low, y + low], color=theme.text, linewidth=0.8)
    mark = " ~" if cell.unsure else ""
    _write(axes, x + 0.5, y + low, cell.value, theme.text, bold=cell.learnt_here)
    if cell.change:
        _write(axes, x + 0.5, y + 0.7, f"{cell.change}{mark}", theme.text, size=7.5)


def _legend(axes: Any, y: float, theme: Theme) -> None:
    from matplotlib.patches import Rectangle

    bounds = [f"{100 * bound:.3g}" for bound in GRADES]
    _write(axes, -0.1, y + 0.16, f"worse by {bounds[-1]} %", theme.muted, size=7.5, side="right")
    for place, grade in enumerate(range(-len(GRADES), len(GRADES) + 1)):
        colour, opacity = tint(grade, theme)
        axes.add_patch(
            Rectangle((0.2 * place, y), 0.18, 0.3, facecolor=colour, alpha=opacity, linewidth=0)
        )
    _write(axes, 2.3, y + 0.16, f"better by {bounds[-1]} %", theme.muted, size=7.5, side="left")


def _write(
    axes: Any, x: float, y: float, text: str, colour: str, *, size: float = 9.0,
    bold: bool = False, side: str = "center",
) -> None:  # fmt: skip
    axes.text(
        x,
        y,
        _short(text),
        ha=side,
        va="center",
        color=colour,
        fontsize=size,
        fontweight="bold" if bold else "normal",
        parse_math=False,
    )


def _short(text: str) -> str:
    told = label(text)
    return told if len(told) <= _LETTERS else f"{told[: _LETTERS - 1]}…"
