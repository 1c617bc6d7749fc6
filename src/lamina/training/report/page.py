"""The page: one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lamina._version import __version__
from lamina.errors import escaped
from lamina.extras import require
from lamina.training.report import sections
from lamina.training.report.facts import RunFacts, StageFacts
from lamina.training.report.figures.drift import drift, is_relative, largest
from lamina.training.report.figures.losses import curve
from lamina.training.report.figures.theme import DARK, LIGHT, Theme, drawing, svg_uri
from lamina.training.report.heat import GRADES, ShownMatrix, better_by, is_change, shown_matrix
from lamina.training.report.lineage import graph_of
from lamina.training.report.settings import settings_of
from lamina.training.report.usage import uses_of
from lamina.training.report.verdict import sentence_of

# Pictures are data, styles are the one whose hash this is, and nothing else is let in.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
    "form-action 'none'"
)


@dataclass(frozen=True)
class Picture:
    """A stage's picture, light and dark.

    Attributes:
        stage: whose it is.
        light, dark: as data URIs.
        alt: what it shows, in words.
        note: what stands below it.
    """

    stage: StageFacts
    light: str
    dark: str
    alt: str
    note: str = ""


def environment(**more: Any) -> Any:
    """Templates that escape all they are given, and miss nothing in silence."""
    jinja2 = require("jinja2", "report")
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("lamina.training.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=readable,
        **more,
    )
    made.filters["number_class"] = number_class
    return made


def readable(value: Any) -> Any:
    """What a reader, or an editor, would obey in a text shows as an escape."""
    # Markup is a text that is escaped already.
    return escaped(value) if type(value) is str else value


def number_class(stage: StageFacts | None) -> str:
    """The class that gives something a stage's colour."""
    return "s-base" if stage is None else f"s{stage.number % len(LIGHT.stages)}"


def page_of(facts: RunFacts) -> str:
    """The whole page."""
    templates = environment()
    style, _, _ = templates.loader.get_source(templates, "style.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    matrix = shown_matrix(facts)
    better, worse, measured = _counts(matrix)
    lines = sections.stage_lines(facts)
    with drawing():
        curves, drifts = _curves(facts), _drifts(facts)
    return str(
        templates.get_template("index.html.j2").render(
            facts=facts,
            policy=_POLICY.format(digest=digest),
            style=style,
            version=__version__,
            verdict=sentence_of(facts, matrix.matrix),
            figures=sections.key_figures(facts, better, worse, measured),
            missing=sections.missing(facts),
            graph=graph_of(facts),
            narrow=graph_of(facts, narrow=True),
            lines=lines,
            columns=sections.known_columns(lines),
            matrix=matrix,
            transfer=sections.transfer_lines(matrix.matrix.backward_transfer),
            legend=_legend(),
            gates=[each for each in facts.stages if each.state and _has_gate(each)],
            curves=curves,
            drifts=drifts,
            drift_lines=_drift_lines(facts),
            answers=sections.answers_of(facts),
            settings=settings_of(facts.stages),
            begun=[each for each in facts.stages if each.inputs],
            data=[(each, sections.sources_of(each)) for each in facts.stages if each.data],
            versions=sections.versions_of(facts),
            uses=uses_of(facts, str(facts.end.directory)) if facts.end else [],
        )
    )


def _has_gate(stage: StageFacts) -> bool:
    return stage.state is not None and (stage.state.gate is not None or bool(stage.state.retries))


def _counts(matrix: ShownMatrix) -> tuple[int, int, int]:
    """How many evals the end is better at than the base, worse at, and how many it was put to."""
    shares = []
    for shown in matrix.rows:
        one, two = shown.row.cells[0].score, shown.row.cells[-1].score
        if one is not None and two is not None:
            shares.append((better_by(one, two) or 0.0) if is_change(one, two) else 0.0)
    return sum(s > 0 for s in shares), sum(s < 0 for s in shares), len(shares)


def _legend() -> list[tuple[int, str]]:
    """Grade -> what it means."""
    names = [f"{100 * bound:.3g}" for bound in GRADES]
    spans = [
        f"under {names[0]} %",
        *(f"{a} to {b} %" for a, b in pairwise(names)),
    ]
    spans.append(f"{names[-1]} % or more")
    worse = [(-grade, f"worse by {spans[grade]}") for grade in range(len(GRADES), 0, -1)]
    better = [(grade, f"better by {spans[grade]}") for grade in range(1, len(GRADES) + 1)]
    return [*worse, (0, f"changed by {spans[0]}"), *better]


def _curves(facts: RunFacts) -> list[Picture]:
    found = []
    for stage in facts.stages:
        if not (stage.curve.train or stage.curve.held_out or stage.curve.broken):
            continue
        found.append(_picture(stage, _curve_alt(stage), lambda t, s=stage: curve(s, t)))
    return found


def _curve_alt(stage: StageFacts) -> str:
    told = [f"Loss of {stage.name} over {stage.curve.steps} steps"]
    for name, points in (("training", stage.curve.train), ("held out", stage.curve.held_out)):
        if points:
            told.append(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}")
    return "; ".join(told)


def _drifts(facts: RunFacts) -> list[Picture]:
    stages = [each for each in facts.stages if each.drift]
    most = largest(stages)
    found = []
    for stage in stages:
        line = sections.drift_line(stage.name, stage.drift)
        of = "relative to the weights" if is_relative(stage.drift) else "as norms"
        alt = f"What {stage.name} changed, layers by modules, {of}: {line.relative} on average"
        found.append(_picture(stage, alt, lambda t, s=stage: drift(s, most, t)))
    return found


def _picture(stage: StageFacts, alt: str, draw: Any) -> Picture:
    def uri(theme: Theme) -> str:
        return svg_uri(draw(theme))

    return Picture(stage, uri(LIGHT), uri(DARK), alt)


def _drift_lines(facts: RunFacts) -> Sequence[tuple[StageFacts, Any, Any]]:
    return [
        (
            each,
            sections.drift_line(each.name, each.drift),
            sections.kinds_of(each.drift),
        )
        for each in facts.stages
        if each.drift
    ]
