"""Tensors kept in a file for the next run, in the format of peft's caches."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from lamina.errors import MissingFileError


def is_there(path: str | Path | None) -> bool:
    """Whether there is a file with something in it."""
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0


def read(path: str | Path, names: Collection[str], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of these names; code in the file is not run.

    Raises:
        MissingFileError: some of them are not in it.
    """
    held = torch.load(path, map_location=device, weights_only=True)
    missing = [name for name in names if name not in held]
    if missing:
        raise MissingFileError(
            f"The cache {path} lacks {len(missing)} of {len(names)} tensors: it was made for "
            "another model or config.",
            faults=missing[:6],
            cure="delete the file, or name another one in the config",
        )
    return {name: held[name] for name in names}


def write(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors at once: a crash leaves the old file or the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.tmp")
    torch.save(tensors, staged)
    staged.replace(target)
