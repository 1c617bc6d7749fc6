"""`lamina merge`: an adapter folded into its base, saved as an ordinary model."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lamina.cli.arguments import Directory, Json, Revision, Subfolder
from lamina.cli.terminal import console, facts, print_json, size

if TYPE_CHECKING:
    from lamina.stages.merged import MergeReport


class Dtype(str, enum.Enum):
    """The dtypes that a model is saved in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class MergeTarget(str, enum.Enum):
    """What a quantised base becomes."""

    QUANTIZED = "quantized"
    DEQUANTIZED = "dequantized"


def merge(
    directory: Directory,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the model is saved.")],
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="The base's directory or hub id, if not as on record."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the saved weights; the base's if not given.")
    ] = None,
    target: Annotated[
        MergeTarget | None,
        typer.Option(help="What a base that is stored quantised becomes."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the model that lies in the output directory.")
    ] = False,
    subfolder: Subfolder = None,
    revision: Revision = None,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Take a base unlike the one on record.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into its base and save an ordinary model, compared with the original."""
    # They import torch.
    import torch

    from lamina.stages.merged import save_merged

    report = save_merged(
        directory,
        output,
        base=base,
        dtype=getattr(torch, dtype.value) if dtype else None,
        target=target.value if target else None,
        force=force,
        subfolder=subfolder,
        revision=revision,
        allow_base_mismatch=allow_base_mismatch,
    )
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print(report)


def _print(report: MergeReport) -> None:
    out = console()
    out.print(Text.assemble((report.path, "bold"), f"  {report.model_class}, adapter folded in"))
    compared = "not compared: the model doesn't take tokens"
    if report.max_logit_difference is not None:
        compared = f"{report.max_logit_difference:.3g}, among logits up to {report.max_logit:.3g}"
    total = size(sum(report.files.values()))
    out.print(
        facts(
            [
                ("size", f"{total}, {report.parameters:,} parameters, {report.dtype}"),
                ("tokenizer", f"from {report.tokenizer}" if report.tokenizer else "none"),
                ("largest difference", compared),
            ]
        )
    )
