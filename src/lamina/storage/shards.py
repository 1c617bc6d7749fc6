"""Read the index of a sharded adapter without trusting it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from lamina.errors import CheckpointError
from lamina.storage.untrusted import read_json

_SHOWN = 8


def shard_names(index: Path, label: str) -> list[str]:
    """The files that an index names, sorted; each is a safetensors file below its directory.

    Raises:
        CheckpointError: see `weight_map`.
    """
    return sorted(set(weight_map(index, label).values()))


def weight_map(index: Path, label: str) -> dict[str, str]:
    """Name of a tensor -> the file that an index says it is in, below the index's directory.

    Raises:
        CheckpointError: it isn't JSON with a `weight_map`, or names a file elsewhere or of a kind
            that isn't safetensors (an index could smuggle in a pickle).
    """
    try:
        values = read_json(index)
        table = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(table, dict) or not all(isinstance(n, str) for n in table.values()):
            raise ValueError("it has no weight_map of names to names of files")
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"'{label}' is not an index of shards: {error}.", cure="copy or download it again"
        ) from error
    names = sorted(set(table.values()))
    faults = [f"{_shown(name)} {fault}" for name in names if (fault := _shard_fault(name))]
    if len(faults) > _SHOWN:
        faults = [*faults[:_SHOWN], f"and {len(faults) - _SHOWN:,} more"]
    if faults or not names:
        raise CheckpointError(
            f"'{label}' can't be followed.",
            faults=faults or ["its weight_map is empty"],
            cure="don't use this adapter unless you know how its index came to be so",
        )
    # "./x" is the file x, and has one name only where files are compared by their names.
    return {key: str(PurePosixPath(name)) for key, name in table.items()}


def _shown(name: str) -> str:
    return f"'{name}'" if len(name) <= 200 else f"'{name[:200]}...'"


def _shard_fault(name: str) -> str | None:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root:
        return "is an absolute path"
    if ".." in windows.parts or "\0" in name:
        return "leads out of the directory"
    if posix.suffix != ".safetensors":
        return "is not a safetensors file"
    return None
