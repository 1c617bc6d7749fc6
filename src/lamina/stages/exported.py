"""What an exported adapter answers over its base, compared with the original."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lamina.checkpoint.adapter import WEIGHTS_NAME
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.export.peft_files import factor_tensors, plain_config, write_peft
from lamina.checkpoint.export.target import Options, Target
from lamina.checkpoint.export.updates import Updates, one_scaling
from lamina.checkpoint.probe import Outputs, ProbeComparison, ask, compare_answers
from lamina.engine.compose import Factors
from lamina.stages.load import load


@dataclass(frozen=True)
class Job:
    """What is to be exported, and how.

    Attributes:
        source: the adapter's directory or hub id.
        where: where in it the adapter lies.
        contents: what it consists of.
        target: the program.
        options: what was asked for.
    """

    source: str | Path
    where: dict[str, Any]
    contents: Contents
    target: Target
    options: Options


def compare_with_base(
    original: str | Path,
    where: Mapping[str, Any],
    base: nn.Module | str | Path,
    exported: Path,
    found: Mapping[str, Factors],
    job: Job,
) -> ProbeComparison | None:
    """Ask the base under the original, then under what a program reads; None if there is no base.

    Args:
        original: the adapter that was asked for, before any compression.
        where: where in it the adapter lies.
        base: the base, or its directory or hub id; one that has a config and no weights is none.
        exported: the directory that was written.
        found: module -> the update that the program reads.
        job: what was written.
    """
    if not isinstance(base, nn.Module) and not _has_weights(Path(base)):
        return None
    expected, loaded = _answers(original, base, **where)
    if expected is None:
        return None
    if WEIGHTS_NAME in job.target.files:
        actual, _ = _answers(exported, loaded)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _write_plain(Path(folder), job.contents, found)
            actual, _ = _answers(folder, loaded)
    assert actual is not None
    dtype = job.options.dtype
    rounded = None if dtype is None else str(dtype).removeprefix("torch.")
    return compare_answers(expected, actual, dtype=rounded)


def _has_weights(base: Path) -> bool:
    # What is no directory is a hub id, whose weights are wherever the hub has them.
    return not base.is_dir() or any(base.glob("*.safetensors")) or any(base.glob("*.bin"))


def _answers(
    path: str | Path, base: nn.Module | str | Path, **where: Any
) -> tuple[Outputs | None, nn.Module]:
    """What the base answers under an adapter, and the base as it was."""
    model = load(path, base if isinstance(base, nn.Module) else str(base), **where)
    try:
        return ask(model), model.get_base_model()
    finally:
        model.unload()


def _write_plain(folder: Path, contents: Contents, found: Mapping[str, Factors]) -> None:
    updates = Updates(contents, dict(found), {})
    factors, scaling = one_scaling(updates)
    ranks = {module: each.rank for module, each in factors.items()}
    config = plain_config(contents, ranks, scaling)
    write_peft(folder, config, factor_tensors(contents, factors), {})
