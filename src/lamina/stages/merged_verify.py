"""Look at a streamed merge before it is published."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lamina.checkpoint.probe import Outputs, ask, compare_answers
from lamina.checkpoint.record import Probe
from lamina.checkpoint.stream.sample import sample
from lamina.model import AutoPeftModel
from lamina.model.auto import open_model
from lamina.stages.load import load
from lamina.stages.merge_report import NotAsExpectedError, Verified
from lamina.stages.merged_in_memory import compared, not_as_expected

if TYPE_CHECKING:
    from lamina.stages.merged_plan import Prepared

# Without a recorded probe, base and adapter have to be loaded too: only small ones by themselves.
_SMALL = 2**30
# A loaded model needs a little more than its weights, and others need memory as well.
_SHARE = 0.5


def verified_of(prepared: Prepared, made: Path) -> tuple[Verified | None, str | None]:
    """(how the result was looked at, why it wasn't).

    "model" opens it and asks it; "samples" computes entries again; "auto" does the first where the
    model fits into half of the memory that is free and either has a recorded probe or is small.

    Raises:
        CheckpointError: the result isn't what it should be.
    """
    how = prepared.asked.verify
    if how == "none":
        return None, None
    probe = prepared.record.newest.probe
    if probe is not None and probe.quantization is not None:
        # Answers over codes are too far from those over a dense base to judge them by.
        probe = None
    if how == "model" or (how == "auto" and _fits(prepared, probe is not None)):
        verified = _by_asking(prepared, made, probe)
        if verified is not None or how == "model":
            return verified, None if verified else "the model takes no tokens"
    return _by_samples(prepared, made), None


def _fits(prepared: Prepared, recorded: bool) -> bool:
    size = prepared.plan.bytes
    return (recorded or size <= _SMALL) and size <= _SHARE * available()


def available() -> int:
    """Bytes of memory that can be had without swapping; 0 where the system doesn't tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def _open(prepared: Prepared, made: Path) -> Any:
    loader = AutoPeftModel.base_class(prepared.file.config)
    cure = "merge again; if it stays so, in memory: streaming=False (--in-memory)"
    return open_model(loader, str(made), cure=cure, dtype="auto").eval()


def _by_asking(prepared: Prepared, made: Path, probe: Probe | None) -> Verified | None:
    dtype = prepared.asked.dtype
    if probe is None:
        expected = _of_base_and_adapter(prepared)
        if expected is None:
            return None
        return compared(expected, _open(prepared, made), "base and adapter", dtype)
    actual = ask(_open(prepared, made), probe.tokens)
    if actual is None:
        return None
    coarsest = _coarsest(prepared, probe.dtype)
    found = compare_answers(probe.chain, actual, dtype=coarsest, quantization=probe.quantization)
    verified = Verified.asked(found, "the probe on record")
    if not found.passed:
        raise not_as_expected(verified)
    return verified


def _coarsest(prepared: Prepared, recorded: str) -> str:
    """Of all dtypes that answers or weights went through: what rounding may do follows it."""
    stored = {s.torch_dtype for s in prepared.files.tensors.values() if s.is_dense}
    known = {getattr(torch, recorded, torch.float32), *stored}
    if prepared.asked.dtype is not None:
        known.add(prepared.asked.dtype)
    return str(max(known, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")


def _of_base_and_adapter(prepared: Prepared) -> Outputs | None:
    asked = prepared.asked
    model = load(asked.path, asked.base, **{"dtype": "auto", **asked.options})
    if asked.dtype is not None:
        model.to(asked.dtype if asked.dtype.itemsize >= 4 else model.dtype)
    return ask(model)


def _by_samples(prepared: Prepared, made: Path) -> Verified:
    found = sample(
        prepared.plan,
        prepared.base,
        made,
        prepared.file.tensors,
        prepared.file.config.to_dict(),
    )
    if found.wrong:
        raise NotAsExpectedError(
            f"{len(found.wrong)} tensor(s) of the merged model aren't what they should be; nothing "
            "was saved.",
            faults=list(found.wrong[:8]),
            cure="merge again; if it stays so, look at the disk and the memory of this machine",
        )
    return Verified(
        "samples",
        "sums in fp64",
        max_difference=found.worst,
        entries=found.entries,
        unseen=found.unseen,
    )
