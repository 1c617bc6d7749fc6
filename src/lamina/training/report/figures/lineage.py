"""The graph of a run as a picture."""

from __future__ import annotations

from typing import Any

from lamina.training.report.figures.theme import Theme, blank, label
from lamina.training.report.lineage import Box, Graph, Line

# Pixels of the drawing per inch of the picture, and the points of a letter per pixel.
_SCALE = 100.0
_POINTS = 72 / _SCALE


def lineage(graph: Graph, theme: Theme) -> Any:
    """Boxes and lines as the page has them."""
    figure = blank(graph.width / _SCALE, graph.height / _SCALE)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, graph.width)
    axes.set_ylim(graph.height, 0)
    for line in graph.lines:
        _line(axes, line, theme)
    for box in graph.boxes:
        _box(axes, box, theme)
    return figure


def _line(axes: Any, line: Line, theme: Theme) -> None:
    xs, ys = zip(*line.points, strict=True)
    axes.plot(
        xs,
        ys,
        color=theme.muted,
        linewidth={"continue": 3.0}.get(line.mode, 1.5),
        linestyle=(0, (4, 3)) if line.mode == "merge" else "-",
        alpha=0.5 if line.look in {"dead", "waiting"} else 0.9,
        solid_joinstyle="round",
        solid_capstyle="butt",
    )
    if line.mode and line.mode != "fresh":
        axes.text(
            *line.label,
            line.mode,
            fontsize=11 * _POINTS,
            ha={"start": "left", "middle": "center", "end": "right"}[line.anchor],
            color=theme.muted,
        )


def _box(axes: Any, box: Box, theme: Theme) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    colour = theme.stage(box.stage)
    faint = box.look in {"dead", "waiting"}
    axes.add_patch(
        FancyBboxPatch(
            (box.x, box.y),
            box.width,
            box.height,
            boxstyle="round,pad=0,rounding_size=9",
            facecolor=theme.page,
            edgecolor=theme.muted if faint or box.stage is None else colour,
            linewidth=1.3,
            linestyle=(0, (4, 3)) if faint or box.look == "open" else "-",
        )
    )
    ink = theme.muted if faint else theme.text
    left, right = box.x + 14, box.x + box.width - 14
    name = axes.text(
        left, box.y + 26, label(box.name), fontsize=15 * _POINTS, fontweight="bold", color=ink,
        parse_math=False,
    )  # fmt: skip
    axes.text(
        right, box.y + 26, label(box.tag), fontsize=12 * _POINTS, color=theme.muted, ha="right",
        parse_math=False,
    )  # fmt: skip
    for number, line in enumerate(box.lines):
        axes.text(
            left, box.y + 47 + 18 * number, label(line), fontsize=12 * _POINTS, color=theme.muted,
            parse_math=False,
        )  # fmt: skip
    for segment in box.bar:
        axes.add_patch(
            Rectangle(
                (segment.x, box.bar_y),
                segment.width,
                7,
                facecolor=theme.stage(segment.stage),
                alpha=0.4 if faint else 1.0,
                linewidth=0,
            )
        )
    if box.look == "dead":
        name.set_text(f"✕ {label(box.name)}")
