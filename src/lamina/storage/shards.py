"""Read the index of a sharded adapter without trusting it."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath

from lamina.errors import CheckpointError


def shard_names(index: Path, label: str) -> list[str]:
    """The files that an index names, sorted; each is a safetensors file below its directory.

    Raises:
        CheckpointError: it isn't JSON with a `weight_map`, or names a file elsewhere or of a kind
            that isn't safetensors (an index could smuggle in a pickle).
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"'{label}' is not an index of shards: {error or type(error).__name__}.",
            cure="copy or download it again",
        ) from error
    faults = [f"'{name}' {fault}" for name in names if (fault := _shard_fault(name))]
    if faults or not names:
        raise CheckpointError(
            f"'{label}' can't be followed.",
            faults=faults or ["its weight_map is empty"],
            cure="don't use this adapter unless you know how its index came to be so",
        )
    return names


def _shard_fault(name: str) -> str | None:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root:
        return "is an absolute path"
    if ".." in windows.parts or "\0" in name:
        return "leads out of the directory"
    if posix.suffix != ".safetensors":
        return "is not a safetensors file"
    return None
