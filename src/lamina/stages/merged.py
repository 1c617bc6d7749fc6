"""Save an adapter folded into its base, as an ordinary model, and look at what was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lamina.checkpoint.stream.restart import check_free
from lamina.errors import ConfigError
from lamina.model.merging import Target, check_target
from lamina.stages.merge_report import MergeReport, Verification, Verified
from lamina.stages.merged_files import refuse_occupied, refuse_sources
from lamina.stages.merged_in_memory import Request, merge_in_memory
from lamina.stages.merged_plan import prepare
from lamina.stages.merged_skeleton import NotStreamable
from lamina.stages.merged_streaming import merge_streaming
from lamina.storage.atomic import check_writable
from lamina.storage.disk import disk_faults_reported

__all__ = ["MergeReport", "Verification", "Verified", "save_merged"]

_WAYS = ("auto", "model", "samples", "none")


def save_merged(
    path: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    target: Target | None = None,
    force: bool = False,
    streaming: bool | None = None,
    verify: Verification = "auto",
    told: Callable[[int, int], None] | None = None,
    **options: Any,
) -> MergeReport:
    """Fold an adapter, with its whole chain, into its base, save the result and look at it.

    The base's files are read tensor by tensor, each sum is made in fp32 and rounded once, and
    written under the name and in the file that it came from: the model is never built, and the
    memory is that of the adapter and a few blocks of rows. What can't be done so is done in memory,
    and the report says why; both ways give the same bits. A merge that is killed leaves its
    finished files hidden beside `out`, and the same call goes on from there. Until the end, `out`
    is what it was; base and adapter are only read.

    Args:
        path: the adapter's directory or hub id.
        out: the directory for the model.
        base: the base's path or hub id; None takes the one on record.
        dtype: of the saved weights; None keeps the base's.
        target: what a base that is stored quantised becomes: "quantized" rounds the sums to its
            codes again, "dequantized" makes it dense.
        force: save into a directory that has files already.
        streaming: False loads base and adapter; True refuses where it can't be streamed; None
            streams what can be.
        verify: how the result is looked at before it is published. "model" opens and asks it, and
            takes its memory; "samples" reads entries back and computes them again in fp64; "auto"
            opens it where it fits easily; "none" doesn't look.
        told: called now and then with the bytes that are written, and those in all.
        options: see `lamina.load`.

    Raises:
        CheckpointError: `out` has files already, can't be written, or is where the adapter or the
            base lies; the disk is too small; the result isn't what it should be.
        DirectoryInUseError: another process writes to `out`.
        StageError: the base is not the one that the adapter was trained on.
        FoldError: the base can't be written, or is quantised and no target is given, or the sum
            has NaN or infinity.
        ConfigError: `target` or `verify` is unknown, there is a `dtype` for codes, or it was to be
            streamed and can't be.
    """
    check_target(target, dtype if target == "quantized" else None)
    if verify not in _WAYS:
        raise ConfigError(f"verify={verify!r} is unknown.", cure=f"one of {', '.join(_WAYS)}")
    place = Path(out).expanduser()
    refuse_sources(place, [str(path), base or ""])
    refuse_occupied(place, force)
    check_writable(place)
    check_free(place)
    asked = Request(path, place, base, dtype, target, verify, options)
    if streaming is False:
        return merge_in_memory(asked, None)
    try:
        prepared = prepare(asked)
    except NotStreamable as error:
        if streaming:
            raise ConfigError(
                f"This merge can't be streamed: {error}.",
                cure="leave streaming=True out, and it is done in memory",
            ) from error
        return merge_in_memory(asked, str(error))
    with disk_faults_reported(place):
        return merge_streaming(prepared, told)
