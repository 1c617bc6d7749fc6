"""Other strings in the header of a safetensors file, its tensors untouched; no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from lamina.checkpoint.digest import files_digest
from lamina.checkpoint.header import data_start, read_header
from lamina.errors import CheckpointError

# Tensors begin at a multiple of it, so that they can be mapped.
_ALIGNED = 8


def rewrite_strings(source: Path, target: Path, strings: Mapping[str, str]) -> None:
    """Copy a safetensors file with other strings in its header; the bytes of tensors are copied.

    Args:
        source: the file.
        target: the new one, in a directory that nobody reads yet.
        strings: the whole of the new `__metadata__`.

    Raises:
        CheckpointError: the source is no safetensors file, or the copy's tensors differ from it.
    """
    header, _ = read_header(source)
    text = json.dumps({"__metadata__": dict(strings), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with source.open("rb") as old, target.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        old.seek(data_start(source))
        shutil.copyfileobj(old, new)
    if files_digest([target]) != files_digest([source]):
        raise CheckpointError(
            f"The copy of {source} differs from it; it was not kept.",
            cure="try again; if it happens again, the disk or the memory is damaged",
        )
