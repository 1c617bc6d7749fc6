"""Write an adapter for another program: check first, write whole or not at all, read back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lamina.checkpoint.adapter import WEIGHTS_NAME, AdapterFile
from lamina.checkpoint.export.base_config import BaseConfig
from lamina.checkpoint.export.contents import Contents, Finding, read_contents
from lamina.checkpoint.export.registry import TARGETS, target_named
from lamina.checkpoint.export.target import Options
from lamina.checkpoint.export.updates import (
    Updates,
    largest_difference,
    loses_digits,
    read_updates,
)
from lamina.checkpoint.export.vllm_ranks import VLLM_DEFAULT_RANK
from lamina.checkpoint.probe import ProbeComparison
from lamina.checkpoint.record import read_record
from lamina.config import LoraConfig, PeftConfig
from lamina.engine.compose import Factors
from lamina.errors import ExportError, LaminaError
from lamina.stages.configs import refuse_edited_config
from lamina.stages.export_base import AnyBase, config_of_base, without_base_copies
from lamina.stages.export_report import ExportCheck, ExportReport
from lamina.stages.exported import Job, compare_with_base
from lamina.stages.flatten import flatten
from lamina.storage.atomic import atomic_directory
from lamina.storage.companions import copy_tokenizer
from lamina.storage.destination import check_destination

# Rounding each entry once, over all entries of a module together.
_ALLOWED = {torch.float32: 2.0**-21, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def check_export(
    path: str | Path,
    *,
    target: str,
    base: AnyBase | None = None,
    rank: int | None = None,
    max_rank: int = VLLM_DEFAULT_RANK,
    served_base: str | None = None,
    **where: Any,
) -> ExportCheck:
    """Ask whether a program takes an adapter; nothing is written. Arguments as for `export`."""
    job = _job(path, target, base, where, rank=rank, max_rank=max_rank, served_base=served_base)
    checked = job.target.check(job.contents, job.options)
    return ExportCheck(
        source=job.contents.source,
        target=target,
        program=job.target.program,
        faults=tuple(checked.faults),
        notes=tuple(checked.notes),
    )


def export(
    path: str | Path,
    out: str | Path,
    *,
    target: str,
    base: AnyBase | None = None,
    rank: int | None = None,
    max_rank: int = VLLM_DEFAULT_RANK,
    dtype: torch.dtype | None = None,
    served_base: str | None = None,
    keep_record: bool = True,
    force: bool = False,
    **where: Any,
) -> ExportReport:
    """Write an adapter as another program wants it, and read the file back as that program does.

    Nothing is dropped: what the program can't take is a fault, and then nothing is written.

    Args:
        path: the adapter's directory or hub id.
        out: the directory to write; a crash leaves what was there, or the new one.
        target: "vllm", "gguf" (llama.cpp), "mlx", "ollama" or "peft".
        base: the base model, or its directory or hub id, which is loaded, and what it answers
            under the exported adapter compared with the original's. For its config alone, which
            GGUF needs, `read_base_config(name)`; None takes the config of the one on record.
        rank: compress larger ranks to this, by the best approximation; the error is reported.
        max_rank: the server's `--max-lora-rank`.
        dtype: of the factors in the file; None keeps theirs, fp32 in GGUF.
        served_base: what ollama calls the base, for `FROM`.
        keep_record: let the stage record go along.
        force: replace an export that lies in `out`.
        where: `subfolder`, `revision`, `token` and more; see `lamina.storage.source.find_adapter`.

    Raises:
        ExportError: the program would refuse the adapter, or answer something else: all faults,
            each with its cure.
        CheckpointError: the adapter is broken, or `out` is not empty.
        RecordError: its config is not as the stage was saved.
    """
    job = _job(
        path,
        target,
        base,
        where,
        rank=rank,
        max_rank=max_rank,
        dtype=dtype,
        served_base=served_base,
        keep_record=keep_record,
    )
    checked = job.target.check(job.contents, job.options)
    if checked.faults:
        raise ExportError(
            f"{job.contents.source} can't be written for {job.target.program}.",
            faults=[str(fault) for fault in checked.faults],
        )
    sources = [path, job.contents.source, *([base] if isinstance(base, (str, Path)) else [])]
    check_destination(out, sources, force=force)
    with _compressed(job) as (job, compression):
        updates = read_updates(job.source, job.contents, **job.where)
        _refuse_not_finite(updates)
        # Nothing may be left of an export for another program.
        owned = {name for each in TARGETS.values() for name in each.files}
        with atomic_directory(out, owned=sorted(owned)) as staging:
            read = _write(job, updates, staging)
            difference, module = largest_difference(updates.factors, read)
            _refuse_difference(difference, module, dtype)
            compared = None
            if base is not None and not isinstance(base, BaseConfig):
                compared = compare_with_base(path, where, base, staging, read, job)
            if compression is None:
                _refuse_answers(compared)
            files = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
    ranks = [each.rank for each in read.values()]
    return ExportReport(
        path=str(out),
        target=target,
        modules=len(read),
        rank=(min(ranks, default=0), max(ranks, default=0)),
        dtype=", ".join(sorted({str(x.A.dtype).removeprefix("torch.") for x in read.values()})),
        files=files,
        notes=(*checked.notes, *_rounding_notes(job, updates)),
        compression=compression,
        difference=difference,
        module=module,
        probe=compared,
    )


def _job(
    path: str | Path, target: str, base: AnyBase | None, where: dict[str, Any], **asked: Any
) -> Job:
    """What is to be done, from headers and configs alone."""
    chosen = target_named(target)
    contents = without_base_copies(read_contents(path, **where), path, base, where)
    _refuse_edited(contents)
    options = Options(base=config_of_base(base, contents, chosen), **asked)
    return Job(path, where, contents, chosen, options)


def _refuse_edited(contents: Contents) -> None:
    record = read_record(contents.metadata, source=contents.source)
    try:
        config = PeftConfig.from_dict(contents.config, source=contents.source)
    except LaminaError:
        # The target's own check says what is wrong with it.
        return
    if record is not None and isinstance(config, LoraConfig):
        file = AdapterFile(contents.source, config, {}, dict(contents.metadata))
        refuse_edited_config(file, record)


def _write(job: Job, updates: Updates, staging: Path) -> dict[str, Factors]:
    """Write the files; what the program reads in them."""
    job.target.write(updates, staging, job.options)
    if job.target.takes_tokenizer:
        copy_tokenizer(job.contents.source, staging)
    return job.target.read_back(updates, staging, job.options)


@contextmanager
def _compressed(job: Job) -> Iterator[tuple[Job, float | None]]:
    """The job with ranks of at most `rank`, and the error; as it is where none is larger."""
    rank = job.options.rank
    if rank is None or job.contents.rank <= rank:
        yield job, None
        return
    with tempfile.TemporaryDirectory() as folder:
        flat = Path(folder) / "flat"
        report = flatten(job.source, flat, rank=rank, **job.where)
        yield (
            replace(job, source=flat, where={}, contents=read_contents(flat)),
            (report.relative_error),
        )


def _rounding_notes(job: Job, updates: Updates) -> list[Finding]:
    record = read_record(job.contents.metadata, source=job.contents.source)
    has_answers = record is not None and record.newest.probe is not None
    verifiable = job.options.keep_record and WEIGHTS_NAME in job.target.files and has_answers
    if not verifiable or not loses_digits(updates, job.options.dtype):
        return []
    return [
        Finding(
            "the recorded answers are left out, since rounded factors answer otherwise",
            "without --dtype they stay, and `lamina verify` replays them",
        )
    ]


def _refuse_not_finite(updates: Updates) -> None:
    bad = [
        module
        for module, each in updates.factors.items()
        if not (each.A.isfinite().all() and each.B.isfinite().all())
    ]
    if bad:
        raise ExportError(
            f"{updates.contents.source} has NaN or infinity in {len(bad)} module(s).",
            faults=bad[:8],
            cure="go back to a checkpoint from before; `lamina doctor DIR` looks through one",
        )


def _refuse_difference(difference: float, module: str | None, dtype: torch.dtype | None) -> None:
    allowed = _ALLOWED.get(dtype or torch.float32, _ALLOWED[torch.bfloat16])
    if not difference <= allowed:
        raise ExportError(
            f"What was written differs from the adapter by {difference:.3g} in {module}; rounding "
            f"accounts for {allowed:.1g}.",
            cure="--dtype float32 keeps what fp16 has no exponent for",
        )


def _refuse_answers(compared: ProbeComparison | None) -> None:
    if compared is not None and not compared.passed:
        raise ExportError(
            "Over its base, what was written answers something else than the adapter: logits up to "
            f"{compared.max_difference:.3g} apart, where {compared.judged_by} accounts for "
            f"{compared.tolerance or 0:.1g}.",
            cure="lamina doctor DIR looks for a cause; nothing was written",
        )
