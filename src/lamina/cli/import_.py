"""`lamina import`: make a plan of another tool's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from lamina.amounts import count_of
from lamina.cli.arguments import Json
from lamina.cli.terminal import console, print_json

INCOMPLETE = 1


def import_(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Its files; one for each stage, or one script."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The plan's file; else it is printed.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
    as_json: Json = False,
) -> None:
    """Make a plan of files of LLaMA-Factory or Axolotl, or of a script with peft and TRL.

    Scripts are read, never run. What can't be carried over is listed, and stands in the plan as
    comments. Exit code 0: the plan can be read. 1: it lacks values, which are named. 2: a file
    can't be understood.
    """
    from lamina.training.plan.importing import import_plan
    from lamina.training.plan.writing import write_plan

    found = import_plan(files)
    if output is not None:
        write_plan(output, found.text, overwrite=force)
    if as_json:
        print_json(
            {
                "tools": found.tools,
                "plan": found.values,
                "notes": [vars(note) for note in found.notes],
                "missing": found.missing,
            }
        )
    else:
        _print(output, found.text, [str(note) for note in found.notes], list(found.missing))
    if found.missing:
        raise typer.Exit(INCOMPLETE)


def _print(output: Path | None, text: str, notes: list[str], missing: list[str]) -> None:
    err = console(stderr=True)
    if output is None:
        # The comments in it say what the list below would.
        console().print(Text(text), soft_wrap=True, end="")
    else:
        err.print(f"wrote {output}", soft_wrap=True)
        if notes:
            err.print(f"{count_of(len(notes), 'thing')} not carried over as it was:")
        for note in notes:
            err.print(Text(f"  - {note}"), soft_wrap=True)
    if missing:
        err.print(Text("It can't be run yet; what is missing or wrong:", style="bold yellow"))
        for fault in missing:
            err.print(Text(f"  - {fault}"), soft_wrap=True)
    elif output is not None:
        err.print(f"next: lamina validate {output}", soft_wrap=True)
