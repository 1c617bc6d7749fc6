"""Write a report: the page, the pictures, the card."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.errors import RunError
from lamina.extras import require
from lamina.storage.atomic import atomic_directory
from lamina.storage.whole import write_whole
from lamina.training.evaluate.matrix import matrix_of
from lamina.training.report.card import card_of, is_ours
from lamina.training.report.facts import RunFacts, facts_of
from lamina.training.report.figures.drift import drifts, largest
from lamina.training.report.figures.lineage import lineage
from lamina.training.report.figures.losses import curves
from lamina.training.report.figures.matrix import matrix
from lamina.training.report.figures.theme import LIGHT, drawing, write_png
from lamina.training.report.heat import shown_matrix
from lamina.training.report.lineage import graph_of
from lamina.training.report.page import page_of
from lamina.training.report.verdict import sentence_of

FOLDER, PAGE, CARD = "report", "index.html", "README.md"
_OWN = (PAGE, CARD, "lineage.png", "curves.png", "matrix.png", "drift.png")


@dataclass(frozen=True)
class ReportResult:
    """Where a report is.

    Attributes:
        html: the page.
        pngs: its pictures, as far as there is something to be seen on them.
        card: the model card for the hub.
        stage_card: the same in the directory of the last stage; None if it isn't there.
        card_was_kept: somebody's own README.md that lies there, and was left as it is.
        verdict: what the end gained and what it cost, in a sentence.
    """

    html: Path
    pngs: tuple[Path, ...]
    card: Path
    stage_card: Path | None
    card_was_kept: Path | None
    verdict: str


def write_report(directory: str | Path) -> ReportResult:
    """Write what a run came to into `directory/report`, from the files that are there.

    The page, index.html, holds all it shows, and loads nothing; README.md is a model card, and is
    put beside the adapter of the last stage too. A run that isn't finished gets a report of what is
    there, which says what is missing. The same files make the same bytes.

    Args:
        directory: a run's `output_dir`.

    Raises:
        RunError: there is no run, or its notes can't be understood.
        MissingExtraError: matplotlib or jinja2 is not installed.
        CheckpointError: the report can't be written.
    """
    for package in ("matplotlib", "jinja2"):
        require(package, "report")
    facts = facts_of(directory)
    page, card = page_of(facts), card_of(facts)
    target = facts.directory / FOLDER
    with atomic_directory(target, owned=_OWN) as staging:
        pngs = _draw(facts, staging)
        (staging / PAGE).write_text(page, encoding="utf-8")
        (staging / CARD).write_text(card, encoding="utf-8")
    beside = _place_beside_adapter(facts)
    ours = beside is None or not os.path.lexists(beside) or is_ours(beside)
    if beside is not None and ours:
        _write(beside, card)
    return ReportResult(
        html=target / PAGE,
        pngs=tuple(target / name for name in pngs),
        card=target / CARD,
        stage_card=beside if beside and ours else None,
        card_was_kept=None if ours else beside,
        verdict=sentence_of(facts, matrix_of(facts.evaluation, facts.chain)),
    )


def _draw(facts: RunFacts, folder: Path) -> list[str]:
    shown = shown_matrix(facts)
    logged = [each for each in facts.stages if each.curve.lines]
    drifted = [each for each in facts.stages if each.drift]
    with drawing():
        figures: dict[str, Any] = {"lineage.png": lineage(graph_of(facts), LIGHT)}
        if logged:
            figures["curves.png"] = curves(logged, LIGHT)
        if shown.rows:
            figures["matrix.png"] = matrix(shown, LIGHT)
        if drifted:
            figures["drift.png"] = drifts(drifted, largest(drifted), LIGHT)
        for name, figure in figures.items():
            write_png(figure, folder / name, LIGHT)
    return list(figures)


def _write(file: Path, text: str) -> None:
    try:
        write_whole(file, text)
    except OSError as error:
        raise RunError(
            f"The model card can't be written to {file}: {error.strerror or error}.",
            cure="the report itself is there; make room or give rights, and write it again",
        ) from error


def _place_beside_adapter(facts: RunFacts) -> Path | None:
    """Where a card is put for whoever is handed the last stage."""
    there = facts.end is not None and facts.end.adapter is not None
    return facts.end.directory / CARD if there and facts.end else None
