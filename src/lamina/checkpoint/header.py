"""The header of a safetensors file: what is in it, read without torch and without the tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from lamina.errors import CheckpointError, MissingFileError

_MAX_HEADER = 100_000_000
_CURE = "copy, download or save the file again"


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Names, dtypes and shapes of the tensors in a safetensors file, and its strings; no torch.

    Returns:
        name -> {"dtype", "shape", "data_offsets"}, and the `__metadata__`. The offsets count from
        the end of the header, see `data_start`.

    Raises:
        CheckpointError: the header is not one, or the file ends before the tensors do.

    Source: https://huggingface.co/docs/safetensors (format)
    """
    try:
        with path.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _MAX_HEADER:
                raise CheckpointError(
                    f"{path} has a header of {length} bytes: it is damaged.", cure=_CURE
                )
            header = json.loads(opened.read(length))
        size = path.stat().st_size
        metadata = header.pop("__metadata__", {}) or {}
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
    except FileNotFoundError as error:
        raise MissingFileError(f"There is no {path}.") from error
    except (
        AttributeError,
        KeyError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}", cure=_CURE) from error
    missing = 8 + length + max(ends, default=0) - size
    if missing > 0:
        raise CheckpointError(f"{path} is cut off: {missing} bytes are missing.", cure=_CURE)
    return header, metadata


def data_start(path: Path) -> int:
    """The byte at which the tensors of a safetensors file begin."""
    with path.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
    return 8 + int(length)
