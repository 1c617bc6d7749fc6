"""`lamina run`: a plan, from its base through all its stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lamina.cli.arguments import Json
from lamina.cli.matrix import print_matrix
from lamina.cli.progress import teller
from lamina.cli.terminal import console, print_json, table

if TYPE_CHECKING:
    from lamina.training.run import RunResult

# As shells have it of a program that Ctrl-C ended.
INTERRUPTED = 130


def run(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan's file.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Over what it says: stages.chat.lora_r=4"),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Run and measure all anew, whatever is there.")
    ] = False,
    report: Annotated[
        bool, typer.Option(help="Write the report into output_dir/report at the end.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Take the base of a plan through all its stages.

    Killed or stopped at any moment, the same command goes on: stages that are finished are kept,
    the one that was running goes on from its last checkpoint. Ctrl-C saves and stops. A stage that
    its gate refuses ends the run with exit code 2.
    """
    from lamina.training.plan import open_plan

    opened = open_plan(plan, changes or [])
    from lamina.training.run import run_plan

    with teller(shown=not as_json) as told:
        result = run_plan(
            opened.plan,
            root=plan.expanduser().resolve().parent,
            document=opened.document,
            console=told,
            resume=not restart,
            report=report,
        )
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        _print(result)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _print(result: RunResult) -> None:
    from lamina.training.run.status import matrix_in

    out = console()
    columns = ["stage", "was", "steps", "loss", "seconds"]
    rows = [
        [
            each.name,
            each.status,
            f"{each.steps:,}",
            f"{(each.metrics or {}).get('train_loss', float('nan')):.4f}",
            f"{each.seconds:.1f}",
        ]
        for each in result.stages
    ]
    out.print(table(columns, rows, right=columns[2:], folded=["stage"]))
    out.print()
    matrix = matrix_in(result.directory)
    if matrix.rows:
        print_matrix(out, matrix)
        out.print()
    for each in result.stages:
        if each.status == "rolled back":
            out.print(Text(f"{each.name} was rolled back: {each.why}", "yellow"), soft_wrap=True)
    if result.interrupted:
        out.print(Text("stopped; the same command goes on", style="yellow"))
    elif not result.path:
        out.print(Text("no stage counts: every one was rolled back", style="yellow"))
    else:
        out.print(Text.assemble("the last stage is in ", (result.path, "bold")), soft_wrap=True)
    if result.report:
        out.print(Text.assemble("the report is ", (result.report, "bold")), soft_wrap=True)
