"""`lamina merge`: an adapter folded into its base, saved as an ordinary model."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lamina.amounts import size
from lamina.cli.arguments import AllowBaseMismatch, Base, Directory, Json, Revision, Subfolder
from lamina.cli.terminal import console, facts, hush_loading, print_json

if TYPE_CHECKING:
    from lamina.stages.merged import MergeReport, Verified


class Dtype(str, enum.Enum):
    """The dtypes that a model is saved in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class MergeTarget(str, enum.Enum):
    """What a quantised base becomes."""

    QUANTIZED = "quantized"
    DEQUANTIZED = "dequantized"


class Look(str, enum.Enum):
    """How the result is looked at."""

    AUTO = "auto"
    MODEL = "model"
    SAMPLES = "samples"
    NONE = "none"


def merge(  # noqa: PLR0913, PLR0917
    directory: Directory,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the model is saved.")],
    base: Base = None,
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
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Load base and adapter instead of streaming them.")
    ] = False,
    verify: Annotated[
        Look,
        typer.Option(
            help="Ask the saved model, compute samples of its weights again, or don't look. "
            "'auto' asks it where it fits easily."
        ),
    ] = Look.AUTO,
    subfolder: Subfolder = None,
    revision: Revision = None,
    allow_base_mismatch: AllowBaseMismatch = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into its base, tensor by tensor, and save an ordinary model."""
    # They import torch.
    import torch

    from lamina.stages.merged import save_merged

    hush_loading()
    with _progress(shown=not as_json) as told:
        report = save_merged(
            directory,
            output,
            base=base,
            dtype=getattr(torch, dtype.value) if dtype else None,
            target=target.value if target else None,
            force=force,
            streaming=False if in_memory else None,
            verify=verify.value,
            told=told,
            subfolder=subfolder,
            revision=revision,
            allow_base_mismatch=allow_base_mismatch,
        )
    if as_json:
        told_of = {"max_logit": report.max_logit}
        told_of["max_logit_difference"] = report.max_logit_difference
        print_json({**dataclasses.asdict(report), **told_of})
    else:
        _print(report)


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the error stream of a terminal; nothing in a pipe."""
    errors = console(stderr=True)
    if not shown or not errors.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = ("merging", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("merging", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(report: MergeReport) -> None:
    out = console()
    out.print(Text.assemble((report.path, "bold"), f"  {report.model_class}, adapter folded in"))
    total = sum(report.files.values())
    out.print(
        facts(
            [
                ("size", f"{size(total)}, {report.parameters:,} parameters, {report.dtype}"),
                ("merged", _way(report, total)),
                ("tokenizer", f"from {report.tokenizer}" if report.tokenizer else "none"),
                *_looked_at(report),
            ]
        )
    )


def _way(report: MergeReport, total: int) -> str:
    took = f"{report.seconds:.1f} s"
    if not report.streamed:
        why = f", since {report.why_in_memory}" if report.why_in_memory else ""
        return f"in memory{why}; {took}"
    speed = total / max(report.seconds, 1e-3)
    kept = f"; {report.kept_files} files were there already" if report.kept_files else ""
    changed = f"{report.changed} tensors changed"
    return f"tensor by tensor, {changed}; {took}, {size(int(speed))}/s{kept}"


def _looked_at(report: MergeReport) -> list[tuple[str, str]]:
    found = report.verified
    if found is None:
        return [("verified", f"no: {report.why_not_verified or 'not asked for'}")]
    if found.how == "samples":
        return [("verified", _samples(found))]
    compared = f"{found.max_difference:.3g}, among logits up to {found.max_logit:.3g}"
    rows = [
        ("verified", f"opened and asked, beside {found.against}"),
        ("largest difference", compared),
    ]
    if found.kl is not None and found.top1_agreement is not None:
        agreed = f"KL {found.kl:.2g} nats, {found.top1_agreement:.0%} of first choices are the same"
        rows.append(("predictions", agreed))
    return rows


def _samples(found: Verified) -> str:
    unseen = f"; {found.unseen} tensors not looked at" if found.unseen else ""
    return (
        f"{found.entries:,} entries computed again in fp64, off by up to "
        f"{found.max_difference:.3f} units in the last place{unseen}"
    )
