"""`lamina status`: how far a run is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lamina.amounts import duration
from lamina.cli.arguments import Json
from lamina.cli.matrix import print_matrix
from lamina.cli.terminal import console, print_json, table

if TYPE_CHECKING:
    from lamina.training.run.status import StageStatus


def status(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="The output_dir of a plan.")],
    as_json: Json = False,
) -> None:
    """Show how far a run is, whether it is running or not."""
    from lamina.training.run.status import matrix_in, status_of

    found = status_of(directory)
    if as_json:
        print_json(
            {**dataclasses.asdict(found), "matrix": dataclasses.asdict(matrix_in(directory))}
        )
        return
    out = console()
    now = "a process works on it" if found.running else "no process works on it"
    out.print(Text.assemble((found.directory, "bold"), f"  {now}"), soft_wrap=True)
    out.print()
    columns = ["stage", "is", "step", "loss", "took", "why"]
    rows = [_row(each) for each in found.stages]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    out.print(table(columns, rows, right=["step", "loss", "took"], folded=["stage", "why"]))
    judged = matrix_in(directory)
    if judged.rows:
        out.print()
        print_matrix(out, judged)


def _row(stage: StageStatus) -> list[str]:
    return [
        stage.name,
        stage.status,
        "" if stage.steps is None else f"{stage.step:,}/{stage.steps:,}",
        "" if stage.loss is None else f"{stage.loss:.4f}",
        duration(stage.seconds) if stage.seconds else "",
        stage.why,
    ]
