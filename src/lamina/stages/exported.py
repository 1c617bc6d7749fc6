"""What an exported adapter answers over its base, compared with the original."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.checkpoint.adapter import WEIGHTS_NAME
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.export.peft_files import factor_tensors, plain_config, write_peft
from lamina.checkpoint.export.target import Target
from lamina.checkpoint.export.updates import Updates, one_scaling
from lamina.checkpoint.probe import Outputs, ProbeComparison, ask, compare_answers
from lamina.engine.compose import Factors
from lamina.stages.load import load


def compare_with_base(
    source: str | Path,
    exported: Path,
    base: nn.Module | str | Path,
    contents: Contents,
    found: Mapping[str, Factors],
    target: Target,
    dtype: torch.dtype | None,
    where: Mapping[str, Any],
) -> ProbeComparison | None:
    """Ask the base under the original, then under what a program reads; None if there is no base.

    Args:
        source: the original.
        exported: the directory that was written.
        base: the base, or its directory or hub id; one that has a config and no weights is none.
        contents: the original's.
        found: module -> the update that the program reads.
        target: the program.
        dtype: that the factors were rounded to; None if they kept theirs.
        where: where in the source the original lies.
    """
    if not isinstance(base, nn.Module) and not _has_weights(Path(base)):
        return None
    expected, loaded = _answers(source, base, **where)
    if expected is None:
        return None
    if WEIGHTS_NAME in target.files:
        actual, _ = _answers(exported, loaded)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _write_plain(Path(folder), contents, found)
            actual, _ = _answers(folder, loaded)
    assert actual is not None
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
