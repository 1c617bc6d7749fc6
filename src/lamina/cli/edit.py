"""`lamina edit`: take the last stage off a chain, or give a stage another name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from lamina.cli.arguments import Directory, Json, ReplaceAdapter, Revision, Subfolder
from lamina.cli.terminal import console, facts, print_json
from lamina.errors import StageError


def edit(
    directory: Directory,
    drop_last: Annotated[
        bool, typer.Option("--drop-last", help="Take the last stage off the chain.")
    ] = False,
    rename: Annotated[
        str | None, typer.Option(metavar="OLD=NEW", help="Give a stage another name.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where the result is saved; in place if not given."),
    ] = None,
    force: ReplaceAdapter = False,
    subfolder: Subfolder = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Drop the last stage of a chain, or rename one; in place, whole or not at all."""
    if drop_last == (rename is not None):
        raise StageError(
            "Say what to change, one thing at a time.",
            cure="lamina edit DIR --drop-last, or lamina edit DIR --rename OLD=NEW",
        )
    old, sign, new = (rename or "").partition("=")
    if rename is not None and not (old and sign and new):
        raise StageError(
            f"--rename {rename} doesn't say which name becomes which.",
            cure="lamina edit DIR --rename OLD=NEW",
        )
    # It imports torch.
    from lamina.stages.edit import drop_last_stage, rename_stage

    where = {"subfolder": subfolder, "revision": revision}
    if drop_last:
        report = drop_last_stage(directory, output, force=force, **where)
    else:
        report = rename_stage(directory, old, new, output, force=force, **where)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    out = console()
    out.print(Text(report.path, "bold"))
    renamed = " is now ".join(report.renamed) if report.renamed else ""
    out.print(
        facts(
            [
                ("dropped", report.dropped or ""),
                ("renamed", renamed),
                ("stages", " → ".join(report.stages)),
            ]
        )
    )
