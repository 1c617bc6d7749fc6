"""`lamina validate`: whether a plan can be run, and what each stage would train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lamina.amounts import short, size
from lamina.cli.arguments import Json
from lamina.cli.terminal import console, facts, print_json, table

if TYPE_CHECKING:
    from rich.console import Console

    from lamina.training.preflight import Need, PlanReport, StageReport

FAILED = 2


def validate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan's file.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Over what it says: stages.chat.lora_r=4"),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Take from the hub what is in its cache only.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say all that is wrong with a plan, with lines, or what each stage would train.

    First what the plan says; then dry runs on the base, the data and this machine. Nothing is
    trained and no weights are loaded. Exit code 0: it can be run. 2: it can't.
    """
    from lamina.training.plan import open_plan

    opened = open_plan(plan, changes or [])
    if offline:
        # Read when the libraries are imported, which is below.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from transformers.utils.logging import disable_progress_bar

    from lamina.training.preflight import check_plan

    disable_progress_bar()
    report = check_plan(opened.plan, document=opened.document)
    if as_json:
        print_json(report.to_dict())
        if not report.ready:
            raise typer.Exit(FAILED)
        return
    _print(console(), report)
    report.check()
    console().print(Text("ready to run", style="bold green"))


def _print(out: Console, report: PlanReport) -> None:
    known = report.base_class is not None and report.base_parameters is not None
    told = f"  {report.base_class}, {short(report.base_parameters or 0)} parameters"
    out.print(Text.assemble((report.base, "bold"), told if known else ""))
    out.print()
    columns = ["stage", "mode", "method", "rank", "layers", "trains", "examples", "steps"]
    rows = [_row(stage) for stage in report.stages]
    out.print(table(columns, rows, right=columns[3:], folded=["stage"]))
    out.print()
    out.print(
        facts(
            [
                *((stage.name, _adapts(stage)) for stage in report.stages),
                *((need.what, _need(need)) for need in report.needs),
            ]
        )
    )
    for note in report.notes:
        out.print(Text.assemble(("note: ", "bold"), note))


def _row(stage: StageReport) -> list[str]:
    return [
        stage.name,
        stage.mode,
        stage.method,
        str(stage.rank),
        _number(stage.layers),
        "?" if stage.trainable is None else short(stage.trainable),
        _number(stage.examples),
        _number(stage.steps),
    ]


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _adapts(stage: StageReport) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in stage.counts.items())
    formats = ", ".join(dict.fromkeys(stage.formats))
    return "; ".join(filter(None, [counts, formats and f"data: {formats}"]))


def _need(need: Need) -> str:
    parts = ", ".join(f"{name} {size(count)}" for name, count in need.parts.items() if count)
    free = "" if need.free is None else f" of {size(need.free)} free in {need.where}"
    return f"about {size(need.bytes)}{free}: {parts}"
