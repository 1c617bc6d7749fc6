"""`lamina flatten`: a chain as one adapter of one stage, exactly or with fewer ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lamina.amounts import count_of
from lamina.cli.arguments import (
    AllowBaseMismatch,
    Directory,
    Json,
    ReplaceAdapter,
    Revision,
    Subfolder,
)
from lamina.cli.terminal import console, facts, hush_loading, print_json, some, span, table

if TYPE_CHECKING:
    from lamina.stages.flatten import FlattenReport, ModuleReport

_SHOWN = 6


def flatten(  # noqa: PLR0913, PLR0917
    directory: Directory,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the adapter is saved.")],
    rank: Annotated[
        int | None, typer.Option(help="The largest rank of a module; all ranks if not given.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="A share like 0.99 of the update, which each module is to hold."),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Only these, as in `domain,chat`; all if not given.")
    ] = None,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate", help="Take DoRA and the like as they act on the base, by --rank."
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="The base, to compare answers or for --approximate."),
    ] = None,
    allow_base_mismatch: AllowBaseMismatch = False,
    force: ReplaceAdapter = False,
    subfolder: Subfolder = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Put all stages of an adapter into one, exactly or compressed; tell what that costs."""
    # It imports torch.
    from lamina.stages.flatten import flatten as put_together

    if base is not None:
        hush_loading()
    report = put_together(
        directory,
        output,
        rank=rank,
        energy=energy,
        stages=None if stages is None else [name.strip() for name in stages.split(",")],
        approximate=approximate,
        base=base,
        allow_base_mismatch=allow_base_mismatch,
        force=force,
        subfolder=subfolder,
        revision=revision,
    )
    if as_json:
        print_json(_finite(dataclasses.asdict(report)))
        return
    out = console()
    how = "exact" if report.exact else f"relative error {_few(report.relative_error)}"
    out.print(Text.assemble((report.path, "bold"), f"  one adapter, {how}"))
    out.print(facts(_facts(report)))
    worst = sorted(report.modules.items(), key=lambda item: -item[1].relative_error)
    rows = [_row(*item) for item in worst[:_SHOWN] if item[1].relative_error]
    if rows:
        out.print()
        out.print(table(["farthest off", "rank", "error", "kept"], rows, right=_NUMBERS))


_NUMBERS = ("rank", "error", "kept")


def _row(name: str, module: ModuleReport) -> list[str]:
    rank = f"{module.rank_before} → {module.rank}"
    return [name, rank, _few(module.relative_error), f"{module.energy:.2%}"]


def _facts(report: FlattenReport) -> Iterator[tuple[str, str]]:
    before = [module.rank_before for module in report.modules.values()]
    was = span((min(before), max(before)))
    now = span(report.rank)
    yield "stages", " → ".join(report.stages)
    yield "left out", some(report.left_out)
    yield (
        "rank",
        f"{now} in {count_of(len(report.modules), 'module')}" + (f", was {was}" * (was != now)),
    )
    yield "scaling", f"{report.scaling:.6g}"
    entries = f"{report.parameters[1]:,} parameters"
    if report.parameters[0] != report.parameters[1]:
        entries += f", were {report.parameters[0]:,}"
    yield "weights", f"{entries}, {', '.join(report.dtypes)}"
    if not report.exact:
        error = f"‖ΔW - ΔW_r‖ / ‖ΔW‖ = {_few(report.relative_error)}"
        yield "of the update", f"{report.energy:.2%} of its squared norm is kept; {error}"
    yield "on the probe", _probe(report)
    yield "tokenizer", some(report.tokenizer)
    for note in report.notes:
        yield "note", note


def _probe(report: FlattenReport) -> str:
    found = report.probe
    if found is None:
        return ""
    told = f"largest difference {_few(found.max_difference)}, among logits up to "
    told += _few(found.max_logit)
    if found.kl is not None:
        told += f"; KL {found.kl:.3g}"
    if found.top1_agreement is not None:
        told += f"; same first choice at {found.top1_agreement:.0%} of positions"
    return told


def _few(value: float) -> str:
    return f"{value:.3g}"


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
