"""`lamina diff`: what changed between two adapters or stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lamina.cli.arguments import Json
from lamina.cli.terminal import console, facts, print_json, some, span, table

if TYPE_CHECKING:
    from lamina.checkpoint.difference import ModuleChange, TensorChange
    from lamina.stages.diff import AdapterDifference, Side

_SIDE = "An adapter's directory or hub id; DIR#STAGE is its chain up to that stage."


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_SIDE)],
    b: Annotated[str, typer.Argument(metavar="B", help=_SIDE)],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="A PNG to draw: layers by modules.")
    ] = None,
    all_modules: Annotated[
        bool, typer.Option("--all", help="A line for each module, not for each kind.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what changed from A to B: norms, effective ranks, angles between subspaces."""
    # They import torch.
    from lamina.stages.diff import diff as compare

    found = compare(a, b)
    if plot is not None:
        from lamina.stages.diff_plot import draw

        draw(found, plot)
    if as_json:
        print_json({**found.to_dict(), "plot": None if plot is None else str(plot)})
        return
    out = console()
    out.print(Text.assemble((found.a.name, "bold"), " → ", (found.b.name, "bold")))
    out.print(facts(_facts(found, plot)))
    out.print()
    out.print(_modules(found, all_modules))
    of = "A and the change" if found.built_on else "A and B"
    out.print(Text(f"∠ between the spaces of {of}: 0° in common, 90° apart", style="dim"))
    if found.tensors:
        out.print()
        out.print(_tensors(found.tensors))


def _facts(found: AdapterDifference, plot: Path | None) -> Iterator[tuple[str, str]]:
    yield "A", _side(found.a)
    yield "B", _side(found.b)
    yield (
        "config",
        ", ".join(
            f"{name} {_told(before)} → {_told(after)}"
            for name, (before, after) in found.config.items()
        ),
    )
    change = f"norm {found.norm_change:.4g}"
    if found.norm_a:
        change += f", {found.norm_change / found.norm_a:.1%} of A's {found.norm_a:.4g}"
    yield "change", change
    yield "only in A", some([each.module for each in found.modules if not each.norm_b])
    yield "only in B", some([each.module for each in found.modules if not each.norm_a])
    if found.only_factors:
        yield "note", "of B and A; what the method makes of them depends on the base"
    yield "drawn", str(plot or "")


def _side(side: Side) -> str:
    return f"{' → '.join(side.stages)}, rank {span(side.rank)}"


def _told(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _modules(found: AdapterDifference, all_modules: bool) -> Any:
    from lamina.checkpoint.shapes import kind_of

    groups: dict[str, list[ModuleChange]] = {}
    for each in found.modules:
        groups.setdefault(each.module if all_modules else kind_of(each.module), []).append(each)
    columns = ["module", "count", "|A|", "|B|", "|B-A|", "change", "cosine"]
    columns += ["eff. rank", "out ∠", "in ∠"]
    rows = [[name, *_row(members)] for name, members in groups.items()]
    if all_modules:
        columns, rows = [columns[0], *columns[2:]], [[row[0], *row[2:]] for row in rows]
    return table(columns, rows, right=columns[1:], folded=("module",))


def _row(members: Sequence[ModuleChange]) -> Iterator[str]:
    yield str(len(members))
    for norms in zip(*((m.norm_a, m.norm_b, m.norm_change) for m in members), strict=True):
        yield f"{_root(norms):.3g}"
    relative = [m.relative for m in members]
    yield _mean(relative, lambda value: f"{value:.1%}")
    yield _mean([m.cosine for m in members], lambda value: f"{value:.3f}")
    yield _mean([m.effective_rank for m in members], lambda value: f"{value:.1f}")
    yield _mean([m.output_angle for m in members], lambda value: f"{value:.0f}°")
    yield _mean([m.input_angle for m in members], lambda value: f"{value:.0f}°")


def _root(values: Iterable[float]) -> float:
    return float(sum(value * value for value in values) ** 0.5)


def _mean(values: Iterable[float | None], show: Any) -> str:
    known = [value for value in values if value is not None]
    return show(sum(known) / len(known)) if known else "-"


def _tensors(tensors: Sequence[TensorChange]) -> Any:
    rows = [
        [each.name, *("-" if n is None else f"{n:.3g}" for n in _norms(each))] for each in tensors
    ]
    columns = ["trained whole", "|A|", "|B|", "|B-A|"]
    return table(columns, rows, right=columns[1:], folded=("trained whole",))


def _norms(change: TensorChange) -> tuple[float | None, ...]:
    return change.norm_a, change.norm_b, change.norm_change
