"""`lamina inspect`: what an adapter directory holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from lamina.amounts import count_of, short, size
from lamina.cli.arguments import Directory, Json, Revision, Subfolder
from lamina.cli.terminal import console, facts, print_json, some, span, table
from lamina.config.readable import readable

# Lines; a broken file may have as many faults as tensors.
_FAULTS = 20

if TYPE_CHECKING:
    from lamina.checkpoint.chain import Chain, StageSummary
    from lamina.checkpoint.describe import AdapterDescription, ModuleKind
    from lamina.checkpoint.methods import Beside
    from lamina.checkpoint.record import Base
    from lamina.checkpoint.scan import Suspect


def inspect(
    directory: Directory,
    subfolder: Subfolder = None,
    revision: Revision = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read headers only: don't look for zeros and NaN.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show an adapter's stages, ranks, sizes and base, and factors that are all zero or NaN."""
    from lamina.checkpoint.describe import describe_adapter

    found = describe_adapter(
        directory, look_for_zeros=not quick, subfolder=subfolder, revision=revision
    )
    if as_json:
        print_json(found.to_dict())
        return
    out = console()
    out.print(_title(found))
    out.print(facts(_facts(found)))
    _print_stages(out, found.chain)
    _print_modules(out, found)
    _print_health(out, found)


def _title(found: AdapterDescription) -> Text:
    if found.has_record:
        kind = f"laminated adapter, {count_of(len(found.chain.stages), 'stage')}"
    else:
        kind = "plain adapter without a stage record: one stage of unknown origin"
    return Text.assemble((found.source, "bold"), f"  {kind}")


def _facts(found: AdapterDescription) -> Iterator[tuple[str, str]]:
    yield "base", base_line(found.base)
    dtypes = ", ".join(
        name if len(found.dtypes) == 1 else f"{name} ({short(count)})"
        for name, count in found.dtypes.items()
    )
    yield "weights", f"{found.parameters:,} parameters, {dtypes}"
    yield "method", "; ".join([found.method, *map(_beside, found.beside)])
    yield "parameters", some(readable(found.config).get("target_parameters") or [])
    yield "scaling", ", ".join(f"{value:g}" for value in found.scaling)
    yield "saved whole", some([m for s in found.chain.stages for m in s.saved_modules])
    yield "biases", some([name for s in found.chain.stages for name in s.biases])
    yield "files", ", ".join(f"{name} {size(count)}" for name, count in found.files.items())


def _beside(tensors: Beside) -> str:
    where = count_of(tensors.modules, "module")
    return f"{tensors.what} of {where}, {tensors.parameters:,} parameters"


def base_line(base: Base) -> str:
    """What is known of a base model, in one line."""
    known = [
        base.model_class,
        f"vocabulary {base.vocab_size:,}" if base.vocab_size else None,
        f"{short(base.parameters)} parameters" if base.parameters else None,
        base.dtype,
        base.quantization,
        f"revision {base.revision}" if base.revision else None,
    ]
    details = ", ".join(each for each in known if each)
    return f"{base.name_or_path or '(not named)'}" + (f" ({details})" if details else "")


def _print_stages(out: Console, chain: Chain) -> None:
    columns = ["stage", "mode", "rank", "modules", "saved (UTC)", "metrics"]
    rows = [_stage_row(stage, chain) for stage in chain.stages]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    out.print()
    out.print(table(columns, rows, right=("rank", "modules"), folded=("metrics",)))


def _stage_row(stage: StageSummary, chain: Chain) -> list[str]:
    group = None if stage.trained is None else chain.groups[stage.trained]
    return [
        stage.name,
        stage.mode or "unknown",
        span(group.rank_range) if group else "-",
        str(len(group.ranks)) if group else "-",
        when(stage.created),
        metrics_line(stage),
    ]


def when(created: str | None) -> str:
    """An ISO 8601 time to the minute."""
    return (created or "-")[:16].replace("T", " ")


def metrics_line(stage: StageSummary) -> str:
    """What was measured, in four digits."""
    return ", ".join(f"{name} {value:.4g}" for name, value in (stage.metrics or {}).items())


def _print_modules(out: Console, found: AdapterDescription) -> None:
    rows = [
        [kind.name, str(kind.count), _ranks(kind), ", ".join(kind.shapes), short(kind.parameters)]
        for kind in found.modules
    ]
    columns = ["module", "count", "rank", "in → out", "parameters"]
    out.print()
    out.print(table(columns, rows, right=("count", "parameters"), folded=("module",)))
    names = [group.begun_by or group.trained_last_by for group in found.chain.groups]
    if len(names) > 1:
        out.print(Text(f"rank = {' + '.join(names)}", style="dim"))


def _ranks(kind: ModuleKind) -> str:
    """The rank, and in a chain its parts: `10 = 4 + 6`."""
    parts = " + ".join(span(each) for each in kind.ranks)
    return f"{span(kind.rank)} = {parts}" if len(kind.ranks) > 1 else span(kind.rank)


def _print_health(out: Console, found: AdapterDescription) -> None:
    out.print()
    for fault in found.faults[:_FAULTS]:
        out.print(Text(f"! {fault}", style="red"))
    if len(found.faults) > _FAULTS:
        out.print(Text(f"! and {len(found.faults) - _FAULTS:,} more: --json has all", style="red"))
    if found.suspects is None:
        return
    lines = list(_suspect_lines(found.suspects))
    for line in lines:
        out.print(line)
    if not lines and not found.faults:
        out.print(Text("No factor is all zero; nothing is NaN or infinite.", style="green"))


def _suspect_lines(suspects: tuple[Suspect, ...]) -> Iterator[Text]:
    alike: dict[tuple[str, str | None, str | None], list[Suspect]] = defaultdict(list)
    for each in suspects:
        alike[each.kind, each.factor, each.stage].append(each)
    for (kind, factor, stage), members in sorted(alike.items(), key=lambda item: item[0][0]):
        part = f"{factor or 'weights'}" + (f" of stage {stage!r}" if stage else "")
        modules = some([each.module for each in members], 3)
        where = f"in {count_of(len(members), 'module')}: {modules}"
        if kind == "zero":
            effect = " (so the adapter changes nothing there)" if factor == "B" else ""
            yield Text(f"! {part} is all zero{effect} {where}", style="yellow")
        else:
            entries = count_of(sum(each.entries for each in members), "entry").replace("ys", "ies")
            yield Text(f"! {part} has {entries} of NaN or infinity {where}", style="red")
