"""`lamina convert`: an adapter out of a model that was trained whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lamina.amounts import count_of
from lamina.cli.arguments import Json, ReplaceAdapter
from lamina.cli.merge import Dtype
from lamina.cli.terminal import console, facts, print_json, some, span, table
from lamina.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from lamina.model.extracting import ExtractedAdapter


def convert(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where the adapter is saved.")],
    tuned: Annotated[str, typer.Option(help="The tuned model's directory.")],
    base: Annotated[str, typer.Option(help="The directory of the model that it was before.")],
    rank: Annotated[
        str, typer.Option(help="The rank; or a share like 0.9, which each layer is to hold.")
    ] = "16",
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="A name for target_modules; may be repeated."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the saved factors.")] = Dtype.FLOAT32,
    force: ReplaceAdapter = False,
    as_json: Json = False,
) -> None:
    """Extract a LoRA adapter from what changed between two models, read tensor by tensor."""
    wanted = _rank(rank)
    _refuse_occupied(output, force)
    # They import torch.
    import torch

    from lamina.model.extracting import extract_lora

    adapter = extract_lora(
        tuned, base, rank=wanted, target_modules=target or None, dtype=getattr(torch, dtype.value)
    )
    adapter.save(output)
    if as_json:
        print_json(_json(adapter, output))
    else:
        _print(adapter, output)


def _rank(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise ConfigError(
            f"--rank {text} is not a number.", cure="give a rank like 16, or a share like 0.9"
        ) from error


def _refuse_occupied(target: Path, force: bool) -> None:
    if not force and target.is_dir() and any(target.iterdir()):
        raise CheckpointError(
            f"'{target}' is not empty.",
            cure="choose another directory, or --force to replace the adapter in it",
        )


def _json(adapter: ExtractedAdapter, output: Path) -> dict[str, Any]:
    return {
        "path": str(output),
        "relative_error": adapter.relative_error,
        "layers": {
            name: {"rank": each.rank, "relative_error": each.relative_error}
            for name, each in adapter.layers.items()
        },
        "unchanged": list(adapter.unchanged),
        "left_out": list(adapter.left_out),
    }


def _print(adapter: ExtractedAdapter, output: Path) -> None:
    out = console()
    layers = adapter.layers
    ranks = [each.rank for each in layers.values()]
    what = f"  {count_of(len(layers), 'layer')}, rank {span((min(ranks), max(ranks)))}"
    out.print(Text.assemble((str(output), "bold"), what))
    worst = sorted(layers.items(), key=lambda item: -item[1].relative_error)[:5]
    out.print(
        facts(
            [
                ("relative error", f"{adapter.relative_error:.3g} over all layers"),
                ("unchanged", some(adapter.unchanged)),
                ("changed, not in it", some(adapter.left_out)),
            ]
        )
    )
    rows = [(name, str(each.rank), f"{each.relative_error:.3g}") for name, each in worst]
    out.print(table(["farthest off", "rank", "error"], rows, right=["rank", "error"]))
