"""`lamina export`: an adapter as another program wants it, checked before and read back after."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lamina.amounts import count_of, size
from lamina.checkpoint.export.vllm_ranks import VLLM_DEFAULT_RANK
from lamina.cli.arguments import Base, Directory, Json, Revision, Subfolder
from lamina.cli.merge import Dtype
from lamina.cli.terminal import console, facts, hush_loading, print_json, span
from lamina.errors import ExportError

if TYPE_CHECKING:
    from lamina.checkpoint.export.contents import Finding
    from lamina.checkpoint.probe import ProbeComparison
    from lamina.stages.export_report import ExportCheck, ExportReport


class For(str, enum.Enum):
    """What an adapter is written for."""

    VLLM = "vllm"
    GGUF = "gguf"
    MLX = "mlx"
    OLLAMA = "ollama"
    PEFT = "peft"


def export(  # noqa: PLR0913, PLR0917
    directory: Directory,
    target: Annotated[For, typer.Option("--for", help="The program that is to take it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where it is written; not with --check.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say what it takes: exit code 0, or 1 if refused.")
    ] = False,
    base: Base = None,
    probe: Annotated[
        bool,
        typer.Option(help="Load the base given by --base, and compare answers before and after."),
    ] = True,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress larger ranks to this; says what is lost.")
    ] = None,
    max_rank: Annotated[
        int, typer.Option(help="The vLLM server's --max-lora-rank.")
    ] = VLLM_DEFAULT_RANK,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the factors; theirs if not given, float32 in GGUF.")
    ] = None,
    served_base: Annotated[
        str | None, typer.Option("--from", help="What ollama calls the base.")
    ] = None,
    strip_record: Annotated[
        bool, typer.Option("--strip-record", help="Leave the stage record out.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the export in the output directory.")
    ] = False,
    subfolder: Subfolder = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write an adapter for vLLM, llama.cpp, MLX, ollama or PEFT, or say what has to change."""
    if output is None and not check:
        raise ExportError(
            "There is no place to write to.",
            cure="--output DIR, or --check to only ask whether it can be written",
        )
    # They import torch.
    import torch

    from lamina.checkpoint.export.base_config import read_base_config
    from lamina.stages.export import check_export
    from lamina.stages.export import export as write

    hush_loading()
    asked: dict[str, Any] = {
        "target": target.value,
        "base": base if base is None or (probe and not check) else read_base_config(base),
        "rank": rank,
        "max_rank": max_rank,
        "served_base": served_base,
        "subfolder": subfolder,
        "revision": revision,
    }
    if check:
        _tell_check(check_export(directory, **asked), as_json)
        return
    assert output is not None
    report = write(
        directory,
        output,
        dtype=getattr(torch, dtype.value) if dtype else None,
        keep_record=not strip_record,
        force=force,
        **asked,
    )
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print(report, max_rank)


def _tell_check(checked: ExportCheck, as_json: bool) -> None:
    if as_json:
        print_json({"ok": checked.ok, **dataclasses.asdict(checked)})
    else:
        out = console()
        verdict = "can be written for" if checked.ok else "can't be written for"
        out.print(Text.assemble((checked.source, "bold"), f"  {verdict} {checked.program}"))
        _print_findings(checked.faults, "red")
        _print_findings(checked.notes, "dim")
    if not checked.ok:
        raise typer.Exit(1)


def _print_findings(findings: Sequence[Finding], style: str) -> None:
    out = console()
    for each in findings:
        out.print(Text.assemble(("  - ", style), each.what), soft_wrap=True)
        if each.cure:
            out.print(Text(f"    {each.cure}", style="dim"), soft_wrap=True)


def _print(report: ExportReport, max_rank: int) -> None:
    out = console()
    what = f"  {count_of(report.modules, 'module')}, rank {span(report.rank)}, {report.dtype}"
    out.print(Text.assemble((report.path, "bold"), what))
    out.print(
        facts(
            [
                ("files", ", ".join(f"{name} {size(n)}" for name, n in report.files.items())),
                ("compressed", _lost(report.compression)),
                ("read back", _difference(report)),
                ("answers", _answers(report.probe)),
                ("to use it", _use(report, max_rank)),
            ]
        )
    )
    _print_findings(report.notes, "yellow")


def _lost(compression: float | None) -> str:
    return "" if compression is None else f"relative error {compression:.3g} over all modules"


def _difference(report: ExportReport) -> str:
    if report.difference == 0:
        return "every update is the same, bit for bit"
    return f"updates within {report.difference:.1e} of the original's, relative to their norm"


def _answers(probe: ProbeComparison | None) -> str:
    if probe is None:
        return "not compared: that needs the base, by --base"
    told = (
        f"logits within {probe.max_difference:.1e} of the original's, among up to "
        f"{probe.max_logit:.3g}"
    )
    if probe.kl is not None:
        told += f"; KL {probe.kl:.2g} nats"
    if probe.top1_agreement is not None:
        told += f"; same first choice at {probe.top1_agreement:.0%} of positions"
    return told


def _use(report: ExportReport, max_rank: int) -> str:
    place = report.path
    return {
        "vllm": f"vllm serve BASE --enable-lora --max-lora-rank {max_rank} "
        f"--lora-modules NAME={place}",
        "gguf": f"llama-server -m BASE.gguf --lora {place}/adapter.gguf",
        "mlx": f"mlx_lm.generate --model BASE --adapter-path {place}",
        "ollama": f"ollama create NAME -f {place}/Modelfile",
        "peft": f"PeftModel.from_pretrained(base, '{place}')",
    }[report.target]
