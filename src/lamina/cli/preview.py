"""`lamina preview`: what the stages of a plan would be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lamina.amounts import count_of
from lamina.cli.arguments import Json
from lamina.cli.terminal import console, facts, print_json, table

if TYPE_CHECKING:
    from lamina.training.data.prepare import SourceReport
    from lamina.training.data.preview import Lengths, Span, StagePreview

_TRAINED, _LEFT = "bold green", "dim"


def preview(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan's file.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STAGE]... [KEY=VALUE]...",
            help="Its stages, all if none is given; settings over what it says.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Examples of each stage that are shown.")] = 2,
    no_color: Annotated[
        bool, typer.Option("--no-color", help="Put [[ ]] around tokens that are trained on.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the data of a plan's stages as their trainers see it: format, lengths, what is learnt.

    Tokens that are trained on are coloured; in a pipe they stand in [[ ]].
    """
    from lamina.training.data.preview import preview as preview_plan

    names = [each for each in words or () if "=" not in each]
    changes = [each for each in words or () if "=" in each]
    found = preview_plan(plan, names, rows=rows, changes=changes)
    if as_json:
        print_json(found.to_dict())
        return
    out = console()
    coloured = out.is_terminal and not out.no_color and not no_color
    for number, each in enumerate(found.stages):
        if number:
            out.print()
        _print_stage(out, each, coloured)


def _print_stage(out: Console, stage: StagePreview, coloured: bool) -> None:
    out.print(Text.assemble((stage.name, "bold"), f"  {stage.method} on {stage.format}"))
    out.print(facts(_facts(stage)))
    out.print()
    shown = ["data", "format", "examples", "held out", "share", "columns not read"]
    rows = [_source(each) for each in stage.sources]
    out.print(table(shown, rows, right=shown[2:5], folded=("data", "columns not read")))
    for number, example in enumerate(stage.examples, 1):
        for name, spans in example.items():
            out.print()
            title = f"example {number}" + (f", {name}" if name else "")
            size = sum(span.tokens for span in spans)
            out.print(Text.assemble((title, "bold"), (f"  {count_of(size, 'token')}", "dim")))
            out.print(Padding(_rendered(spans, coloured), (0, 0, 0, 2), expand=False))


def _facts(stage: StagePreview) -> Iterator[tuple[str, str]]:
    yield "trainer gets", ", ".join(stage.columns)
    if stage.rows is None:
        yield "an epoch", "streaming: not known"
    else:
        drawn = "; by weight, until every example has come" if stage.weighted else ""
        yield "an epoch", f"{count_of(stage.rows, 'example')}{drawn}"
    if stage.held_out is None:
        yield "evaluation", "streaming: not known"
    else:
        yield "evaluation", count_of(stage.held_out, "example") if stage.held_out else "none"
    yield "length", _lengths(stage)
    yield "cut", _cut(stage.lengths)
    if stage.method != "grpo":
        yield "learnt", _share_learnt(stage.lengths)
    for note in stage.notes:
        yield "note", note


def _lengths(stage: StagePreview) -> str:
    found = stage.lengths
    first = "" if found.measured == stage.rows else "the first "
    of = f"of {first}{count_of(found.measured, 'example')}"
    if found.shortest == found.longest:
        return f"{count_of(found.longest, 'token')} ({of})"
    return f"{found.shortest:,} to {found.longest:,} tokens, median {found.median:,.0f} ({of})"


def _cut(found: Lengths) -> str:
    if found.max_length is None:
        return "nothing: prompts are taken whole"
    share = found.too_long / found.measured
    left = f"; {found.left_out:,} left out, nothing being left to learn" if found.left_out else ""
    return f"{found.too_long:,} ({share:.1%}) are longer than max_length {found.max_length:,}{left}"


def _share_learnt(found: Lengths) -> str:
    if not found.tokens:
        return "nothing"
    return f"{found.trained:,} of {found.tokens:,} tokens ({found.trained / found.tokens:.0%})"


def _source(source: SourceReport) -> list[str]:
    return [
        source.path,
        source.format,
        "?" if source.rows is None else f"{source.rows:,}",
        f"{source.held_out:,}" if source.held_out else "-",
        "?" if source.share is None else f"{source.share:.0%}",
        ", ".join(source.dropped) or "-",
    ]


def _rendered(spans: tuple[Span, ...], coloured: bool) -> Text:
    if coloured:
        return Text.assemble(*((span.text, _TRAINED if span.trained else _LEFT) for span in spans))
    return Text("".join(f"[[{span.text}]]" if span.trained else span.text for span in spans))
