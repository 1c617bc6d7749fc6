"""`lamina split`: each stage of a chain as an adapter of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lamina.amounts import count_of
from lamina.cli.arguments import Directory, Json, Revision, Subfolder
from lamina.cli.terminal import console, facts, print_json, some, span, table

if TYPE_CHECKING:
    from lamina.stages.split import StagePart


def split(
    directory: Directory,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where each stage gets a folder; empty or new.")
    ],
    subfolder: Subfolder = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Save each stage as a plain adapter of its own; all of them together are the chain."""
    # It imports torch.
    from lamina.stages.split import split as take_apart

    report = take_apart(directory, output, subfolder=subfolder, revision=revision)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    out = console()
    many = count_of(len(report.parts), "adapter")
    out.print(Text.assemble((report.path, "bold"), f"  {many}, whose sum is the chain"))
    out.print()
    columns = ["folder", "rank", "modules", "scaling", "parameters", "trained on"]
    out.print(
        table(
            columns,
            map(_row, report.parts),
            right=("rank", "modules", "scaling", "parameters"),
            folded=("trained on",),
        )
    )
    notes = [(part.stage, line) for part in report.parts for line in _notes(part)]
    if notes or report.tokenizer:
        out.print()
        out.print(facts([*notes, ("tokenizer", some(report.tokenizer))]))


def _row(part: StagePart) -> list[str]:
    return [
        part.stage,
        span(part.ranks),
        str(part.modules),
        ", ".join(f"{value:.4g}" for value in part.scaling),
        f"{part.parameters:,}",
        " → ".join(["base", *part.left_out]),
    ]


def _notes(part: StagePart) -> list[str]:
    lines = list(part.notes)
    if part.saved_modules:
        lines.append(f"trained whole: {some(part.saved_modules)}")
    if part.biases:
        lines.append(count_of(part.biases, "bias").replace("biass", "biases"))
    if part.rows:
        lines.append(f"{count_of(part.rows, 'row')} of tables")
    return lines
