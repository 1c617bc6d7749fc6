"""Curves of losses over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lamina.training.report.curves import smoothed
from lamina.training.report.facts import StageFacts
from lamina.training.report.figures.theme import Theme, blank, label

_SIZE = (4.3, 2.5)
_ABREAST = 3
# Above so many points, single ones are noise, and their running mean is what is looked at.
_MANY = 40


def curve(stage: StageFacts, theme: Theme) -> Any:
    """One stage's losses."""
    figure = blank(*_SIZE)
    _panel(figure.subplots(), stage, theme, titled=False)
    return figure


def curves(stages: Sequence[StageFacts], theme: Theme) -> Any:
    """Those of all stages, each on scales of its own: losses of different methods aren't one."""
    columns = min(_ABREAST, len(stages))
    rows = math.ceil(len(stages) / columns)
    figure = blank(_SIZE[0] * columns, (_SIZE[1] + 0.3) * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for number, panel in enumerate(panels):
        if number < len(stages):
            _panel(panel, stages[number], theme, titled=True)
        else:
            panel.set_axis_off()
    return figure


def _panel(axes: Any, stage: StageFacts, theme: Theme, *, titled: bool) -> None:
    drawn = stage.curve
    colour = theme.stage(stage.number)
    if drawn.train:
        _train(axes, drawn.train, colour)
    if drawn.held_out:
        steps, losses = zip(*drawn.held_out, strict=True)
        axes.plot(
            steps,
            losses,
            color=theme.text,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            marker="o",
            markersize=3.5 if len(steps) <= _MANY else 0,
            label="held out",
        )
    if drawn.broken:
        low = axes.get_ylim()[0]
        axes.plot(
            drawn.broken,
            [low] * len(drawn.broken),
            "x",
            color=theme.worse,
            clip_on=False,
            markersize=5,
            label="no finite number",
        )
    _frame(axes, theme)
    if drawn.train or drawn.held_out or drawn.broken:
        axes.legend(frameon=False, fontsize=8, labelcolor=theme.muted, loc="best")
    else:
        axes.text(
            0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center", color=theme.muted
        )
        axes.set_yticks([])
        axes.set_xticks([])
    axes.set_xlabel("step", color=theme.muted, fontsize=8)
    axes.set_ylabel("loss", color=theme.muted, fontsize=8)
    if titled:
        method = f"  {label(stage.method)}" if stage.method else ""
        axes.set_title(
            f"{label(stage.name)}{method}",
            loc="left",
            fontsize=10,
            fontweight="bold",
            color=colour,
            parse_math=False,
        )


def _train(axes: Any, points: Sequence[tuple[int, float]], colour: str) -> None:
    steps, losses = zip(*points, strict=True)
    if len(points) <= _MANY:
        marker = "o" if len(points) == 1 else None
        axes.plot(steps, losses, color=colour, linewidth=1.8, marker=marker, label="training")
        return
    axes.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.35)
    means = smoothed(points, max(2, len(points) // 40))
    axes.plot(
        *zip(*means, strict=True), color=colour, linewidth=1.8, label="training, running mean"
    )


def _frame(axes: Any, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.rule)
    axes.grid(axis="y", color=theme.rule, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=8, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02, y=0.08)
