"""`lamina verify`: whether base and adapter still answer as when the stage was saved."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lamina.cli.arguments import Base, Directory, Json, Revision, Subfolder
from lamina.cli.terminal import console, facts, hush_loading, print_json

if TYPE_CHECKING:
    from lamina.checkpoint.probe import ProbeComparison
    from lamina.stages.verify import VerifyReport

FAILED = 1
_MARKS = {"passed": ("ok", "green"), "failed": ("FAILED", "bold red"), "not checked": ("-", "dim")}
# Checks whose figures have a table of their own.
_IN_FIGURES = ("base answers", "answers")


class LoadDtype(str, enum.Enum):
    """What a base can be loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def verify(
    directory: Directory,
    base: Base = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="The tokenizer's directory or hub id; else that by adapter or base."),
    ] = None,
    dtype: Annotated[
        LoadDtype | None, typer.Option(help="To load the base in; as on record if not given.")
    ] = None,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option(
            "--load-in-4bit/--dense",
            help="Load the base through bitsandbytes or not; as on record if not given.",
            show_default=False,
        ),
    ] = None,
    require_proof: Annotated[
        bool,
        typer.Option("--require-proof", help="Fail also where no answers are on record."),
    ] = False,
    subfolder: Subfolder = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Check that base and adapter answer as when the stage was saved; if not, say why.

    Exit code 0: nothing is wrong. 1: something is. 2: the adapter or its base can't be read.
    """
    from lamina.stages.verify import verify as verified

    hush_loading()
    report = verified(
        directory,
        base,
        tokenizer=tokenizer,
        dtype=dtype.value if dtype else None,
        load_in_4bit=load_in_4bit,
        subfolder=subfolder,
        revision=revision,
    )
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
    if not report.passed or (require_proof and not report.proved):
        raise typer.Exit(FAILED)


def _print(report: VerifyReport) -> None:
    out = console()
    out.print(Text.assemble((report.path, "bold"), "  ", _verdict(report)))
    out.print(
        facts(
            [
                ("stages", " → ".join(report.stages)),
                ("base", report.base or "(not named)"),
            ]
        )
    )
    out.print()
    out.print(_checks(report))
    if report.answers is not None:
        out.print()
        out.print(_figures(report))
    for note in report.notes:
        out.print(Text.assemble(("note: ", "bold"), note))
    _print_causes(out, report)


def _verdict(report: VerifyReport) -> tuple[str, str]:
    if not report.passed:
        return "FAILED", "bold red"
    if report.answers is not None:
        loosely = report.answers.kl_tolerance is not None
        but = ", but for the quantiser" if loosely else ""
        return f"verified: it answers as when it was saved{but}", "bold green"
    return "not proved: nothing is wrong, but no answers are on record to replay", "bold yellow"


def _checks(report: VerifyReport) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    made.add_column(no_wrap=True)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for check in report.checks:
        if check.name in _IN_FIGURES and report.answers is not None:
            continue
        mark, style = _MARKS[check.verdict]
        dim = "dim" if check.verdict == "not checked" else ""
        made.add_row(Text(mark, style=style), Text(check.name), Text(check.detail, style=dim))
    return made


def _figures(report: VerifyReport) -> Table:
    """A row for each figure, and a column for the base alone and with the adapter."""
    sides = [("base alone", report.base_answers), ("base and adapter", report.answers)]
    known = [(name, compared) for name, compared in sides if compared is not None]
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    made.add_column(Text("answers, beside the record"), style="dim", no_wrap=True)
    for name, _ in known:
        made.add_column(Text(name), justify="right")
    made.add_column(Text("tolerance"), justify="right")
    rows = [_rows(compared) for _, compared in known]
    for lines in zip(*rows, strict=True):
        title, tolerance = lines[-1][0], lines[-1][2]
        if any(value for _, value, _ in lines):
            made.add_row(title, *(Text(value) for _, value, _ in lines), Text(tolerance))
    verdicts = [Text(*_MARKS["passed" if found.passed else "failed"]) for _, found in known]
    made.add_row("", *verdicts, "")
    return made


def _rows(compared: ProbeComparison) -> list[tuple[str, str, str]]:
    """(figure, value, tolerance)."""
    kl, top1 = compared.kl, compared.top1_agreement
    least = compared.top1_tolerance
    return [
        (
            "largest difference",
            f"{compared.max_difference:.2g}",
            "" if compared.tolerance is None else f"at most {compared.tolerance:.2g}",
        ),
        ("among logits up to", f"{compared.max_logit:.3g}", ""),
        (
            "KL divergence, nats",
            "" if kl is None else f"{kl:.2g}",
            "" if compared.kl_tolerance is None else f"at most {compared.kl_tolerance:.2g}",
        ),
        (
            "same first choice",
            "" if top1 is None else f"{top1:.0%}",
            "" if least is None else f"at least {least:.0%}",
        ),
    ]


def _print_causes(out: Console, report: VerifyReport) -> None:
    for index, cause in enumerate(report.causes):
        title = "Likeliest cause: " if index == 0 else "Also: "
        out.print()
        out.print(Text.assemble((title, "bold"), cause.sentence, "."))
        out.print(Text.assemble(("To mend it: ", "bold"), cause.cure), soft_wrap=True)
