"""Merge by loading base and adapter: for what can't be streamed, and for who asks for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamina.checkpoint.probe import Outputs, ask, compare_answers
from lamina.model.merging import Target
from lamina.stages.bases import describe_base
from lamina.stages.load import load
from lamina.stages.merge_report import (
    MergeReport,
    NotAsExpectedError,
    Verification,
    Verified,
)
from lamina.stages.merged_files import MODEL_FILES, TOKENIZER_FILES, refuse_sources
from lamina.storage.atomic import ADAPTER_FILES, atomic_directory


@dataclass(frozen=True)
class Request:
    """What is to be merged, and into what.

    Attributes:
        path: the adapter's directory or hub id.
        place: the directory for the model.
        base: the base's path or hub id; None takes the one on record.
        dtype: of the saved weights; None keeps the base's.
        target: what a base that is stored quantised becomes.
        verify: how the result is looked at.
        options: see `lamina.load`.
    """

    path: str | Path
    place: Path
    base: str | None
    dtype: torch.dtype | None
    target: Target | None
    verify: Verification
    options: dict[str, Any]


def merge_in_memory(asked: Request, why: str | None) -> MergeReport:
    """Load, merge, save, open again and compare.

    Args:
        asked: what.
        why: the reason for doing it in memory; None if that was asked for.
    """
    began = time.monotonic()
    model = load(asked.path, asked.base, **{"dtype": "auto", **asked.options})
    source = str(getattr(model.get_base_model(), "name_or_path", "") or "")
    refuse_sources(asked.place, [source])
    described = describe_base(model.get_base_model())
    kept: torch.dtype = getattr(torch, described.dtype or "float32")
    quantised = described.quantization is not None
    dtype, target = asked.dtype, asked.target
    if dtype is not None and not quantised:
        # Widening is exact, so that the only rounding is the one to `dtype`.
        model.to(torch.promote_types(kept, dtype))
    wanted = asked.verify in ("auto", "model")
    expected = ask(model) if wanted else None
    merged: Any = model.merge_and_unload(
        safe_merge=True, target=target, dtype=dtype if target == "dequantized" else None
    )
    if not quantised or target == "dequantized":
        merged = merged.to(dtype or kept)
    kind, parameters = type(merged), sum(p.numel() for p in merged.parameters())
    with atomic_directory(asked.place, owned=(*ADAPTER_FILES, *MODEL_FILES)) as staging:
        merged.save_pretrained(staging)
        tokenizer = _save_tokenizer([str(asked.path), source], staging)
        del merged, model
        seconds = time.monotonic() - began
        verified = _compared(expected, kind, staging, dtype, judged=not quantised)
        files = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
    return MergeReport(
        path=str(asked.place),
        model_class=kind.__name__,
        dtype=str(dtype or kept).removeprefix("torch."),
        parameters=parameters,
        files=files,
        tokenizer=tokenizer,
        streamed=False,
        why_in_memory=why,
        seconds=seconds,
        verified=verified,
        why_not_verified="the model takes no tokens" if wanted and not verified else None,
    )


def _compared(
    expected: Outputs | None, kind: Any, directory: Path, dtype: torch.dtype | None, *, judged: bool
) -> Verified | None:
    if expected is None:
        return None
    again = kind.from_pretrained(directory, dtype="auto").eval()
    return compared(expected, again, "base and adapter", dtype, judged=judged)


def compared(
    expected: Outputs,
    model: Any,
    against: str,
    dtype: torch.dtype | None,
    *,
    judged: bool = True,
) -> Verified | None:
    """Ask a model that was opened again what was asked before.

    Raises:
        CheckpointError: it answers otherwise than rounding explains.
    """
    actual = ask(model, expected.tokens)
    if actual is None:
        return None
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    found = compare_answers(expected, actual, dtype=name)
    verified = Verified.asked(found, against)
    if judged and not found.passed:
        raise not_as_expected(verified)
    return verified


def not_as_expected(verified: Verified) -> NotAsExpectedError:
    """The error that says how far the result is from what it should be."""
    fault = (
        f"logits differ by up to {verified.max_difference:.3g}, where rounding explains "
        f"{verified.tolerance or 0:.3g}; the largest is {verified.max_logit or 0:.3g}"
    )
    return NotAsExpectedError(
        f"The merged model doesn't answer as {verified.against}; nothing was saved.",
        faults=[fault],
        cure="lamina verify ADAPTER says whether base and adapter answer as they did; "
        "verify='none' (--verify none) saves it all the same",
    )


def _save_tokenizer(sources: Sequence[str], target: Path) -> str | None:
    """Save the tokenizer that lies with the adapter, else the base's; where it came from."""
    from transformers import AutoTokenizer

    for source in sources:
        place = Path(source).expanduser()
        local = place.is_dir()
        if not source or (local and not any((place / f).exists() for f in TOKENIZER_FILES)):
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            tokenizer.save_pretrained(target)
        except (OSError, ValueError, ImportError):
            # An adapter on the hub rarely has one, and a model may do without.
            continue
        return source
    return None
