"""The graph of a run: base and stages as boxes, how each was begun as lines between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from lamina.amounts import count_of
from lamina.training.report.facts import RunFacts, StageFacts
from lamina.training.report.written import ranks, short, span

# How many boxes stand side by side; more go one below the other.
_ABREAST = 5
_PADDING, _BAR = 14, 7
_MARGIN = 3
Points = tuple[tuple[float, float], ...]
# From this width on a box has one line instead of two.
_WIDE = 400


@dataclass(frozen=True)
class Segment:
    """A part of a bar of ranks.

    Attributes:
        stage: the number of the stage that began these ranks; None if it is none of the run.
        x: of its left end.
        width: in pixels.
        title: whose ranks they are.
    """

    stage: int | None
    x: float
    width: float
    title: str


@dataclass(frozen=True)
class Box:
    """The base, or a stage.

    Attributes:
        stage: its number; None is the base.
        look: "base", "done", "open" (not finished), "waiting" or "dead".
        x, y, width, height: in pixels.
        name, tag, lines: what stands in it, short enough to fit.
        title: the name, whole.
        bar: its ranks.
    """

    stage: int | None
    look: str
    x: float
    y: float
    width: float
    height: float
    name: str
    tag: str
    lines: tuple[str, ...]
    title: str
    bar: tuple[Segment, ...] = ()

    @property
    def bar_y(self) -> float:
        """The top of the bar of ranks."""
        return self.y + self.height - _PADDING - _BAR + 3


@dataclass(frozen=True)
class Line:
    """How a stage was begun on what is below it.

    Attributes:
        mode: "fresh", "continue", "stack" or "merge".
        look: as of the stage's box.
        points: corners of the way, in pixels.
        label: where the mode is written: a point of its baseline.
        anchor: which one: "start", "middle" or "end".
    """

    mode: str
    look: str
    points: Points
    label: tuple[float, float]
    anchor: str

    @property
    def path(self) -> str:
        """For the `d` of an SVG path, with round corners."""
        return " ".join(_steps(self.points))


@dataclass(frozen=True)
class Graph:
    """The whole drawing, in pixels."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]


def graph_of(facts: RunFacts, *, narrow: bool = False) -> Graph:
    """Lay the graph out: boxes side by side, or where there are many one below the other.

    Args:
        facts: of the run.
        narrow: one below the other in any case, and no wider than a telephone.
    """
    if narrow:
        return _upright(facts, width=296.0, height=104.0, gap=40.0)
    if len(facts.stages) + 1 > _ABREAST:
        return _upright(facts, width=620.0, height=84.0, gap=32.0)
    return _abreast(facts)


def _abreast(facts: RunFacts) -> Graph:
    width, height, gap, drop = 196.0, 104.0, 74.0, 136.0
    step = width + gap
    boxes = [_base(facts, _MARGIN, _MARGIN, width, height)]
    lines = []
    place: dict[str | None, int] = {None: 0}
    place |= {each.name: each.number + 1 for each in facts.stages}
    for stage in facts.stages:
        x = _MARGIN + place[stage.name] * step
        y = _MARGIN + (drop if stage.is_dead_end else 0.0)
        box = _box(facts, stage, x, y, width, height)
        begin = _MARGIN + place[stage.built_on] * step + width
        middle, end = _MARGIN + height / 2, y + height / 2
        turn = x - gap / 2
        corners: Points = ((begin, middle), (x, middle))
        if end != middle:
            corners = ((begin, middle), (turn, middle), (turn, end), (x, end))
        # Of a dead end it stands between the two rows, where nothing else is.
        straight = end == middle
        label = (turn, middle - 9) if straight else (turn - 6, _MARGIN + (height + drop) / 2 + 4)
        anchor = "middle" if straight else "end"
        lines.append(Line(stage.mode or "", box.look, corners, label, anchor))
        boxes.append(box)
    lowest = max(box.y + box.height for box in boxes)
    rightmost = max(box.x + box.width for box in boxes)
    return Graph(rightmost + _MARGIN, lowest + _MARGIN, tuple(boxes), tuple(lines))


def _upright(facts: RunFacts, *, width: float, height: float, gap: float) -> Graph:
    rail, head, indent = _MARGIN + 22.0, height - 24.0, 44.0
    boxes = [_base(facts, _MARGIN, _MARGIN, width, head)]
    lines = []
    bottom: dict[str | None, float] = {None: boxes[0].y + head}
    for stage in facts.stages:
        y = _MARGIN + head + gap + stage.number * (height + gap)
        x = _MARGIN + (indent if stage.is_dead_end else 0.0)
        box = _box(facts, stage, x, y, width - (x - _MARGIN), height)
        bottom[stage.name] = y + height
        begin = (rail, bottom[stage.built_on])
        corners: Points = (begin, (rail, y))
        if stage.is_dead_end:
            corners = (begin, (rail, y + height / 2), (x, y + height / 2))
        label = (rail + (indent if stage.is_dead_end else 10), y - gap / 2 + 4)
        lines.append(Line(stage.mode or "", box.look, corners, label, "start"))
        boxes.append(box)
    last = boxes[-1]
    size = width + 2 * _MARGIN, last.y + last.height + _MARGIN
    return Graph(*size, tuple(boxes), tuple(lines))


def _base(facts: RunFacts, x: float, y: float, width: float, height: float) -> Box:
    whole = facts.base_name or "the base"
    told = [facts.base.model_class or "base model"]
    told.append(f"{short(facts.base.parameters)} parameters" if facts.base.parameters else "")
    told = _folded(told, width)
    name = PurePath(whole).name or whole
    return Box(
        stage=None,
        look="base",
        x=x,
        y=y,
        width=width,
        height=height,
        name=_cut(name, width - 54, 15),
        tag="base",
        lines=tuple(_cut(line, width, 12) for line in told),
        title=whole,
    )


def _box(
    facts: RunFacts, stage: StageFacts, x: float, y: float, width: float, height: float
) -> Box:
    tag = stage.method or ""
    return Box(
        stage=stage.number,
        look=look_of(stage),
        x=x,
        y=y,
        width=width,
        height=height,
        name=_cut(stage.name, width - 8 - 8 * len(tag), 15),
        tag=_cut(tag, 80, 12),
        lines=tuple(_cut(line, width, 12) for line in _folded(_lines(stage), width)),
        title=f"{stage.name}: {stage.standing}",
        bar=_bar(facts, stage, x + _PADDING, width - 2 * _PADDING),
    )


def _folded(lines: Sequence[str], width: float) -> list[str]:
    """Lines that aren't empty; on one where there is room."""
    told = [line for line in lines if line]
    return [", ".join(told)] if width > _WIDE else told


def look_of(stage: StageFacts) -> str:
    """How a stage is drawn."""
    if stage.is_dead_end:
        return "dead"
    if stage.standing == "finished":
        return "done"
    return "waiting" if stage.standing == "waiting" else "open"


def _lines(stage: StageFacts) -> list[str]:
    state = stage.state
    second = stage.standing
    if stage.standing == "finished" and state is not None:
        second = f"{count_of(state.steps, 'step')}, {span(state.seconds)}"
    elif state is not None and state.steps and not stage.is_dead_end:
        second += f" after {count_of(state.steps, 'step')}"
    return [rank_line(stage), second]


def rank_line(stage: StageFacts) -> str:
    """Whose ranks a stage trained, and how many."""
    if stage.adapter is None:
        rank = stage.inputs.get("lora_r")
        asked = isinstance(rank, int) and stage.mode != "continue"
        return f"rank {rank}" if asked else ""
    chain = stage.adapter.chain
    trained = chain.stages[-1].trained
    if trained is None:
        return "no ranks of its own"
    group = chain.groups[trained]
    rank = ranks(group.rank_range)
    if group.begun_by not in (stage.name, None):
        return f"rank {rank} of {group.begun_by}"
    return f"rank {rank} in {count_of(len(group.ranks), 'module')}"


def _bar(facts: RunFacts, stage: StageFacts, x: float, width: float) -> tuple[Segment, ...]:
    """The ranks in a stage's file, each in the colour of the stage that began it."""
    groups = stage.adapter.chain.groups if stage.adapter else ()
    whole = sum(group.rank_range[1] for group in groups)
    if not whole:
        return ()
    numbers = {each.name: each.number for each in facts.stages}
    found = []
    for group in groups:
        part = width * group.rank_range[1] / whole
        owner = group.begun_by or group.trained_last_by
        title = f"rank {ranks(group.rank_range)}, begun by {owner}"
        if group.continued_by:
            title += f", trained on by {', '.join(group.continued_by)}"
        found.append(Segment(numbers.get(owner), x, max(part - 2, 1.0), title))
        x += part
    return tuple(found)


def _cut(text: str, width: float, size: float) -> str:
    """As much of a text as fits, by what letters of a sans-serif take on average."""
    room = max(4, int((width - 2 * _PADDING) / (0.56 * size)))
    return text if len(text) <= room else f"{text[: room - 1]}…"


def _steps(points: Sequence[tuple[float, float]], radius: float = 10.0) -> list[str]:
    found = [f"M {points[0][0]:.1f} {points[0][1]:.1f}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        into, out = _towards(corner, before, radius), _towards(corner, after, radius)
        found.append(f"L {into[0]:.1f} {into[1]:.1f}")
        found.append(f"Q {corner[0]:.1f} {corner[1]:.1f} {out[0]:.1f} {out[1]:.1f}")
    found.append(f"L {points[-1][0]:.1f} {points[-1][1]:.1f}")
    return found


def _towards(
    corner: tuple[float, float], other: tuple[float, float], radius: float
) -> tuple[float, float]:
    dx, dy = other[0] - corner[0], other[1] - corner[1]
    length = (dx * dx + dy * dy) ** 0.5 or 1.0
    part = min(radius, length / 2) / length
    return corner[0] + dx * part, corner[1] + dy * part
