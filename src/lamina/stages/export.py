"""Write an adapter for another program: check first, write whole or not at all, read back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lamina.checkpoint.adapter import WEIGHTS_NAME
from lamina.checkpoint.export.base_config import BaseConfig, base_config, read_base_config
from lamina.checkpoint.export.contents import Contents, Finding, read_contents
from lamina.checkpoint.export.limits import VLLM_DEFAULT_RANK
from lamina.checkpoint.export.registry import TARGETS, target_named
from lamina.checkpoint.export.target import Options, Target
from lamina.checkpoint.export.updates import (
    Updates,
    largest_difference,
    loses_digits,
    read_updates,
)
from lamina.checkpoint.origin import PREFIX
from lamina.checkpoint.probe import ProbeComparison
from lamina.checkpoint.record import read_record
from lamina.checkpoint.weights import WeightsOnDisk
from lamina.errors import CheckpointError, ExportError
from lamina.stages.exported import compare_with_base
from lamina.stages.flatten import flatten
from lamina.storage.atomic import atomic_directory
from lamina.storage.companions import copy_tokenizer
from lamina.storage.destination import check_destination

AnyBase: TypeAlias = nn.Module | str | Path | BaseConfig
# Rounding each entry once, over all entries of a module together.
_ALLOWED = {torch.float32: 2.0**-21, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@dataclass(frozen=True)
class ExportCheck:
    """What a program would say to an adapter.

    Attributes:
        source: the adapter.
        target: what it is for.
        program: what would open it.
        faults: why it can't be written; none if it can.
        notes: what to know.
    """

    source: str
    target: str
    program: str
    faults: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether it can be written."""
        return not self.faults


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the directory.
        target: what it is for.
        modules: how many modules are in it.
        rank: the smallest and the largest rank that was written.
        dtype: of the factors in the file.
        files: name -> bytes.
        notes: what to know.
        compression: `‖ΔW - ΔW_r‖_F / ‖ΔW‖_F` over all modules, where ranks were left out; None
            where none were.
        difference: the largest `‖ΔW - ΔW_file‖_F / ‖ΔW‖_F` of a module, the file's being what the
            program computes from it; of the compressed update where ranks were left out.
        module: the module in which it is; None where there is no difference at all.
        probe: what base and exported adapter answer, compared with base and original; None without
            a base to ask.
    """

    path: str
    target: str
    modules: int
    rank: tuple[int, int]
    dtype: str
    files: dict[str, int]
    notes: tuple[Finding, ...]
    compression: float | None
    difference: float
    module: str | None
    probe: ProbeComparison | None


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
    chosen = target_named(target)
    contents = _without_base_copies(read_contents(path, **where), path, base, where)
    known = _base_config(base, contents, chosen)
    options = Options(max_rank=max_rank, rank=rank, base=known, served_base=served_base)
    checked = chosen.check(contents, options)
    return ExportCheck(
        contents.source, target, chosen.program, tuple(checked.faults), tuple(checked.notes)
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
    """
    chosen = target_named(target)
    contents = _without_base_copies(read_contents(path, **where), path, base, where)
    options = Options(
        max_rank=max_rank,
        rank=rank,
        dtype=dtype,
        base=_base_config(base, contents, chosen),
        served_base=served_base,
        keep_record=keep_record,
    )
    checked = chosen.check(contents, options)
    if checked.faults:
        raise ExportError(
            f"{contents.source} can't be written for {chosen.program}.",
            faults=[str(fault) for fault in checked.faults],
        )
    sources = [path, contents.source, *([base] if isinstance(base, (str, Path)) else [])]
    check_destination(out, sources, force=force)
    with _compressed(path, rank, contents, where) as (source, compression):
        if compression is not None:
            contents = _without_base_copies(read_contents(source), source, base, {})
        updates = read_updates(source, contents, **(where if compression is None else {}))
        # Nothing may be left of an export for another program.
        owned = {name for each in TARGETS.values() for name in each.files}
        with atomic_directory(out, owned=sorted(owned)) as staging:
            chosen.write(updates, staging, options)
            if chosen.takes_tokenizer:
                copy_tokenizer(contents.source, staging)
            found = chosen.read_back(updates, staging, options)
            difference, module = largest_difference(updates.factors, found)
            _refuse_difference(difference, module, dtype)
            compared = (
                compare_with_base(path, staging, base, contents, found, chosen, dtype, where)
                if base is not None and not isinstance(base, BaseConfig)
                else None
            )
            if compression is None:
                _refuse_answers(compared)
            files = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
    ranks = [each.A.shape[0] for each in found.values()]
    return ExportReport(
        path=str(out),
        target=target,
        modules=len(found),
        rank=(min(ranks, default=0), max(ranks, default=0)),
        dtype=", ".join(sorted({str(x.A.dtype).removeprefix("torch.") for x in found.values()})),
        files=files,
        notes=(*checked.notes, *_rounding_notes(contents, updates, options, chosen)),
        compression=compression,
        difference=difference,
        module=module,
        probe=compared,
    )


@contextmanager
def _compressed(
    path: str | Path, rank: int | None, contents: Contents, where: dict[str, Any]
) -> Iterator[tuple[str | Path, float | None]]:
    """The adapter with ranks of at most `rank`, and the error; as it is where none is larger."""
    if rank is None or contents.rank <= rank:
        yield path, None
        return
    with tempfile.TemporaryDirectory() as folder:
        report = flatten(path, Path(folder) / "flat", rank=rank, **where)
        yield Path(folder) / "flat", report.relative_error


def _base_config(base: AnyBase | None, contents: Contents, target: Target) -> BaseConfig | None:
    """The config of the base that was given, else of the one on record; None if it isn't to be had.

    A recorded hub id is only asked for where the target can't do without.
    """
    if isinstance(base, BaseConfig):
        return base
    if isinstance(base, nn.Module):
        config = getattr(base, "config", None)
        if config is None:
            return None
        name = getattr(config, "name_or_path", None) or type(base).__name__
        return base_config(config, type(base).__name__, source=name)
    if base is not None:
        return read_base_config(str(base))
    recorded = _recorded_base(contents)
    if recorded is None or not (target.needs_base or Path(recorded).is_dir()):
        return None
    try:
        return read_base_config(recorded)
    except ExportError:
        return None


def _recorded_base(contents: Contents) -> str | None:
    record = read_record(contents.metadata, source=contents.source)
    told = record.newest.base.name_or_path if record else None
    named = told or contents.config.get("base_model_name_or_path")
    return named if isinstance(named, str) else None


def _without_base_copies(
    contents: Contents, path: str | Path, base: AnyBase | None, where: dict[str, Any]
) -> Contents:
    """The contents without values beside the factors that are the base's own, told by comparing."""
    if not contents.base_weights or base is None or isinstance(base, nn.Module):
        return contents
    try:
        known = WeightsOnDisk(base.source if isinstance(base, BaseConfig) else base)
    except CheckpointError:
        return contents
    tensors = read_updates(path, contents, **where).others
    own = {
        key
        for key in contents.base_weights
        if _is_base(tensors[key], known, key.removeprefix(PREFIX).replace(".base_layer.", "."))
    }
    return replace(contents, base_weights=tuple(k for k in contents.base_weights if k not in own))


def _is_base(tensor: torch.Tensor, known: WeightsOnDisk, name: str) -> bool:
    if name not in known:
        return False
    mine = known[name]
    return mine.shape == tensor.shape and torch.equal(mine.to(tensor.dtype), tensor)


def _rounding_notes(
    contents: Contents, updates: Updates, options: Options, target: Target
) -> list[Finding]:
    record = read_record(contents.metadata, source=contents.source)
    has_answers = record is not None and record.newest.probe is not None
    verifiable = options.keep_record and WEIGHTS_NAME in target.files and has_answers
    if not verifiable or not loses_digits(updates, options.dtype):
        return []
    return [
        Finding(
            "the recorded answers are left out, since rounded factors answer otherwise",
            "without --dtype they stay, and `lamina verify` replays them",
        )
    ]


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
