"""Merge tensor by tensor: read, fold and write what was planned, look at it, and publish it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from lamina.checkpoint.stream.files import INDEX
from lamina.checkpoint.stream.restart import Unfinished, unfinished
from lamina.checkpoint.stream.run import Told, run
from lamina.errors import CheckpointError, FoldError
from lamina.stages.merge_report import MergeReport, NotAsExpectedError
from lamina.stages.merged_files import MODEL_FILES, copy_beside, write_config
from lamina.stages.merged_plan import Prepared, state_of
from lamina.stages.merged_verify import verified_of
from lamina.storage.atomic import ADAPTER_FILES, atomic_directory

# What is written beside the weights.
_REST = 64 * 2**20


def merge_streaming(prepared: Prepared, told: Told | None = None) -> MergeReport:
    """Write what was planned, look at it, and publish it whole.

    Raises:
        CheckpointError: the disk is too small, or the result isn't what it should be.
        FoldError: NaN or infinity would come out.
    """
    asked, plan = prepared.asked, prepared.plan
    sizes = {file.name: file.size for file in plan.files}
    headers = {file.name: file.header for file in plan.files}
    with unfinished(asked.place, prepared.identity, sizes, headers) as place:
        _refuse_too_small(place, sizes)
        try:
            run(plan, prepared.base, place, told)
            _refuse_changed(prepared)
            place.keep_only_weights()
            tokenizer = _write_rest(prepared, place.model)
            seconds = time.monotonic() - prepared.began
            verified, why_not = verified_of(prepared, place.model)
        except (FoldError, NotAsExpectedError):
            place.discard()
            raise
        files = {
            str(file.relative_to(place.model)): file.stat().st_size
            for file in sorted(place.model.rglob("*"))
            if file.is_file()
        }
        with atomic_directory(asked.place, owned=(*ADAPTER_FILES, *MODEL_FILES)) as staging:
            place.hand_over(staging)
    return MergeReport(
        path=str(asked.place),
        model_class=prepared.model_class,
        dtype=plan.dtype,
        parameters=prepared.parameters,
        files=files,
        tokenizer=tokenizer,
        streamed=True,
        changed=plan.changed,
        kept_files=place.kept,
        seconds=seconds,
        verified=verified,
        why_not_verified=why_not,
    )


def _write_rest(prepared: Prepared, target: Path) -> str | None:
    write_config(prepared.base, prepared.config, target)
    if prepared.plan.index is not None:
        (target / INDEX).write_text(prepared.plan.index, encoding="utf-8")
    elif prepared.plan.keeps_index:
        shutil.copyfile(prepared.base / INDEX, target / INDEX)
    return copy_beside(prepared.base, prepared.adapter_directory, target)


def _refuse_too_small(place: Unfinished, sizes: Mapping[str, int]) -> None:
    needed = _REST + sum(size for name, size in sizes.items() if name not in place.done)
    free = shutil.disk_usage(place.directory).free
    if needed > free:
        if not place.done:
            shutil.rmtree(place.directory, ignore_errors=True)
        raise CheckpointError(
            f"The disk at '{place.directory.parent}' is too small for the merged model.",
            faults=[f"it takes {needed:,} bytes; {free:,} are free"],
            cure="free some space, or save to another disk",
        )


def _refuse_changed(prepared: Prepared) -> None:
    if state_of(prepared.files) != prepared.identity["base"]:
        raise NotAsExpectedError(
            f"The base in '{prepared.base}' was changed while it was merged; nothing was saved.",
            cure="leave it alone, and merge again",
        )
