"""The header of a safetensors file: what is in it, read without torch and without the tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from lamina.errors import CheckpointError, MissingFileError

_MAX_HEADER = 100_000_000
_NOT_ONE = (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)


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
        start = data_start(path)
        with path.open("rb") as opened:
            opened.seek(8)
            header = json.loads(opened.read(start - 8))
        metadata = header.pop("__metadata__", {}) or {}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        missing = start + end - path.stat().st_size
    except FileNotFoundError as error:
        raise MissingFileError(f"There is no {path}.") from error
    except (*_NOT_ONE, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: {error}",
            cure="copy, download or save the file again",
        ) from error
    if missing > 0:
        raise CheckpointError(
            f"{path} is cut off: {missing:,} bytes are missing.",
            cure="copy, download or save the file again",
        )
    return header, metadata


def data_start(path: Path) -> int:
    """The byte at which the tensors of a safetensors file begin.

    Raises:
        ValueError: the header's length can't be true.
    """
    with path.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
    if length > _MAX_HEADER:
        raise ValueError(f"its header claims to have {length:,} bytes")
    return 8 + int(length)
