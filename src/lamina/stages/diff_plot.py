"""Where in a model an adapter changed: layers by modules, as a PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamina.checkpoint.difference import ModuleChange
from lamina.extras import require
from lamina.stages.diff import AdapterDifference

_NUMBER = re.compile(r"\.(\d+)\.")
# A cell's height and width in inches; beyond this many rows they shrink.
_CELL, _MOST = 0.28, 100
_EMPTY = "0.93"


def place_of(module: str) -> tuple[int | None, str]:
    """The layer of a module, the first number in its name, and what it is called in its layer."""
    found = _NUMBER.search(module)
    return (int(found[1]), module[found.end() :]) if found else (None, module)


def draw(difference: AdapterDifference, path: Path) -> None:
    """Draw two heat maps, the norm of the change and the angle of outputs, to a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {place_of(each.module): each for each in difference.modules}
    layers = sorted({layer for layer, _ in found}, key=lambda layer: -1 if layer is None else layer)
    kinds = list(dict.fromkeys(kind for _, kind in found))
    row = min(_CELL, _CELL * _MOST / len(layers))
    figure = Figure(
        figsize=(3.5 + 2 * max(1.5, 0.55 * len(kinds)), 2.4 + max(1.2, row * len(layers))), dpi=150
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    norms = [[_norm(found.get((layer, kind))) for kind in kinds] for layer in layers]
    angles = [[_angle(found.get((layer, kind))) for kind in kinds] for layer in layers]
    _panel(panels[0], norms, kinds, "norm of the change", "viridis", None)
    of = "A and the change" if difference.built_on else "A and B"
    _panel(panels[1], angles, kinds, f"angle between the outputs of {of}, degrees", "magma", 90.0)
    step = max(1, math.ceil(len(layers) / 40))
    ticks = range(0, len(layers), step)
    panels[0].set_yticks(ticks, ["-" if layers[i] is None else str(layers[i]) for i in ticks])
    panels[0].set_ylabel("layer")
    figure.suptitle(f"{difference.a.name} → {difference.b.name}", fontsize=10, parse_math=False)
    figure.tight_layout()
    figure.savefig(path)


def _panel(
    axes: Any,
    values: Sequence[Sequence[float]],
    kinds: Sequence[str],
    title: str,
    colours: str,
    most: float | None,
) -> None:
    axes.set_facecolor(_EMPTY)
    image = axes.imshow(values, cmap=colours, vmin=0, vmax=most, aspect="auto")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=8, parse_math=False)
    axes.set_title(title, fontsize=9)
    axes.figure.colorbar(image, ax=axes)


def _norm(change: ModuleChange | None) -> float:
    return math.nan if change is None else change.norm_change


def _angle(change: ModuleChange | None) -> float:
    return math.nan if change is None or change.output_angle is None else change.output_angle
