"""Colours and letters of the pictures, light and dark; the page's own style sheet has the same."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.errors import escaped
from lamina.extras import require

DOTS_PER_INCH = 160
# Letters are those of whoever looks at it; those that the text was measured in come last.
_LETTERS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_FONT = re.compile(r"(font: )([^;\"]*?)(\d+(?:\.\d+)?px) [^;\"]*")


@dataclass(frozen=True)
class Theme:
    """The colours of one of the two.

    Attributes:
        page: behind everything, where a picture isn't see-through.
        text, muted, rule: of letters, of less important ones, and of thin lines.
        better, worse: the two ends of changes.
        heat: from nothing to most.
        stages: a colour for each stage; the ninth has the first's again.
    """

    page: str
    text: str
    muted: str
    rule: str
    better: str
    worse: str
    heat: tuple[str, ...]
    stages: tuple[str, ...]

    def stage(self, number: int | None) -> str:
        """The colour of a stage; the base has none of its own."""
        return self.muted if number is None else self.stages[number % len(self.stages)]


LIGHT = Theme(
    page="#ffffff",
    text="#23262b",
    muted="#6a6f78",
    rule="#dddad3",
    better="#12806f",
    worse="#c4572a",
    heat=("#f0f2f6", "#b9cbe6", "#6f97cf", "#2f62ad", "#12356e"),
    stages=(
        "#2f6db5",
        "#c2611f",
        "#2b8460",
        "#8a51b3",
        "#a67c00",
        "#b5416a",
        "#17818f",
        "#6b7280",
    ),
)
DARK = Theme(
    page="#1c1f24",
    text="#e6e4df",
    muted="#9a9fa8",
    rule="#34383f",
    better="#3fb8a2",
    worse="#ec8a5e",
    heat=("#20242b", "#28406a", "#3a68ad", "#6f9fe0", "#d3e3fb"),
    stages=(
        "#77aef0",
        "#ee9d63",
        "#66c79a",
        "#c096ea",
        "#dfba55",
        "#ee8cab",
        "#5fc6d4",
        "#a6abb5",
    ),
)


@contextmanager
def drawing() -> Iterator[None]:
    """Settings of matplotlib that are the same everywhere, whatever the user's are."""
    matplotlib = require("matplotlib", "report")
    with warnings.catch_warnings(), matplotlib.rc_context():
        # A name in letters that the font lacks is drawn as boxes in a PNG, and well in an SVG.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "lamina"
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["font.size"] = 9.0
        matplotlib.rcParams["axes.unicode_minus"] = True
        yield


def blank(width: float, height: float) -> Any:
    """An empty figure of so many inches; nothing of it is shared with other threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label(text: str) -> str:
    """A name as it may stand in a picture: on one line, and nothing that XML forbids."""
    return escaped(text).replace("\n", " ").replace("\t", " ")


def svg_uri(figure: Any) -> str:
    """A picture for the page: see-through, its letters those of the reader's system."""
    told = io.BytesIO()
    figure.savefig(told, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = _FONT.sub(
        lambda found: f"{found[1]}{found[2]}{found[3]} {_LETTERS}", told.getvalue().decode()
    )
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def write_png(figure: Any, file: Path, theme: Theme) -> None:
    """A picture for anywhere else."""
    figure.savefig(
        file,
        format="png",
        dpi=DOTS_PER_INCH,
        facecolor=theme.page,
        metadata={"Software": None},
        bbox_inches="tight",
        pad_inches=0.15,
    )
