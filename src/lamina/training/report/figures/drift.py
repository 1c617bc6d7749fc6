"""Heat maps of what each stage changed: layers by modules."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from lamina.training.evaluate.scores import ModuleDrift
from lamina.training.report.facts import StageFacts
from lamina.training.report.figures.theme import Theme, blank, label

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_WIDTH, _ROW, _MOST = 4.3, 0.22, 40
_ABREAST = 3
_LETTERS = 26


def place_of(module: str) -> tuple[int | None, str]:
    """The layer of a module, the first number in its name, and what it is called in its layer."""
    found = _NUMBER.search(module)
    if not found or len(found[1]) > 6:
        return None, module
    return int(found[1]), module[found.end() :]


def drift(stage: StageFacts, most: float, theme: Theme) -> Any:
    """One stage's changes; `most` is where the colours end."""
    figure = blank(_WIDTH, _height(stage.drift))
    _panel(figure, figure.subplots(), stage, most, theme, titled=False)
    return figure


def drifts(stages: Sequence[StageFacts], most: float, theme: Theme) -> Any:
    """Those of all stages, in the same colours."""
    columns = min(_ABREAST, len(stages))
    rows = math.ceil(len(stages) / columns)
    height = max(_height(each.drift) for each in stages)
    figure = blank(_WIDTH * columns, (height + 0.25) * rows)
    for number, panel in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if number < len(stages):
            _panel(figure, panel, stages[number], most, theme, titled=True)
        else:
            panel.set_axis_off()
    return figure


def largest(stages: Sequence[StageFacts]) -> float:
    """The largest value of any stage: where the colours end."""
    drifts = [each for stage in stages for each in stage.drift]
    values = [shown for each in drifts if math.isfinite(shown := _shown(each, drifts))]
    return max(values, default=0.0)


def is_relative(drifts: Sequence[ModuleDrift]) -> bool:
    """Whether norms can be put over those of the base's weights."""
    return any(each.relative is not None for each in drifts)


def _shown(drift: ModuleDrift, among: Sequence[ModuleDrift]) -> float:
    if not is_relative(among):
        return drift.norm
    return math.nan if drift.relative is None else drift.relative


def _height(drifts: Sequence[ModuleDrift]) -> float:
    layers = len({place_of(each.module)[0] for each in drifts})
    return 1.5 + max(0.9, _ROW * min(layers, _MOST) + 0.08 * max(0, layers - _MOST))


def _panel(
    figure: Any, axes: Any, stage: StageFacts, most: float, theme: Theme, *, titled: bool
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    drifts = stage.drift
    found = {place_of(each.module): _shown(each, drifts) for each in drifts}
    layers = sorted({layer for layer, _ in found}, key=lambda layer: -1 if layer is None else layer)
    kinds = list(dict.fromkeys(kind for _, kind in found))
    colours = LinearSegmentedColormap.from_list("heat", list(theme.heat))
    values = [[found.get((layer, kind), math.nan) for kind in kinds] for layer in layers]
    few = len(layers) <= _MOST
    mesh = axes.pcolormesh(
        values,
        cmap=colours,
        vmin=0,
        vmax=most or 1.0,
        edgecolors=theme.page,
        linewidth=1.2 if few else 0,
        antialiased=few,
    )
    axes.invert_yaxis()
    places = [number + 0.5 for number in range(len(kinds))]
    axes.set_xticks(
        places, [_end(kind) for kind in kinds], rotation=40, ha="right", parse_math=False
    )
    step = max(1, math.ceil(len(layers) / 12))
    ticks = range(0, len(layers), step)
    names = ["–" if layers[number] is None else str(layers[number]) for number in ticks]
    axes.set_yticks([number + 0.5 for number in ticks], names)
    axes.set_ylabel("layer", color=theme.muted, fontsize=8)
    axes.tick_params(colors=theme.muted, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _scale(figure, mesh, axes, theme, relative=is_relative(drifts))
    if titled:
        axes.set_title(
            label(stage.name),
            loc="left",
            fontsize=10,
            fontweight="bold",
            color=theme.stage(stage.number),
            parse_math=False,
        )


def _scale(figure: Any, mesh: Any, axes: Any, theme: Theme, *, relative: bool) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    bar = figure.colorbar(mesh, ax=axes, aspect=16, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    if relative:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def _end(kind: str) -> str:
    """The part of a name that tells most."""
    told = label(kind).removeprefix("self_attn.").removeprefix("mlp.")
    return told if len(told) <= _LETTERS else f"…{told[1 - _LETTERS :]}"
