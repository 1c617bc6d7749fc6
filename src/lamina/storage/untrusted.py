"""Read files that anyone may have written: regular files only, JSON of bounded size and depth."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from lamina.errors import CheckpointError, MissingFileError

# Bytes; the format of safetensors has the same limit for its header.
LARGEST_JSON = 100_000_000
# An index of 500,000 tensors, or the header of 100,000, has fewer parts. Each costs some hundred
# bytes of memory, whatever it costs in the file.
_MOST_PARTS = 2_000_000
# No config, index, header or record is as deep.
_DEEPEST = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read from it; a pipe, a device or a socket isn't waited for.

    Links are followed: the cache of the hub is made of them.

    Raises:
        MissingFileError: there is nothing.
        CheckpointError: it is no regular file, or can't be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        opened = os.open(path, flags)
    except FileNotFoundError as error:
        raise MissingFileError(f"There is no {path}.") from error
    except (OSError, ValueError) as error:
        told = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path} can't be read: {told}.") from error
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise CheckpointError(f"{path} can't be read: it is no regular file.")
    return os.fdopen(opened, "rb")


def read_json(path: Path) -> Any:
    """The value in a file of JSON, see `parse_json`.

    Raises:
        MissingFileError, CheckpointError: it can't be read.
        ValueError: it is not JSON, or not as JSON of ours is.
    """
    with open_regular(path) as opened:
        try:
            content = opened.read(LARGEST_JSON + 1)
        except OSError as error:
            told = os.strerror(error.errno or errno.EIO)
            raise CheckpointError(f"{path} can't be read: {told}.") from error
    return parse_json(content)


def parse_json(content: bytes | str) -> Any:
    """The value that JSON in UTF-8 describes.

    Refused is what readers understand in different ways (names that come twice in an object, NaN,
    infinity, halves of surrogate pairs), and what would take much memory or a deep stack.

    Raises:
        ValueError: it is not JSON, or one of these; says which.
    """
    if len(content) > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    if sum(map(text.count, ",[{")) > _MOST_PARTS:
        raise ValueError(f"it has more than {_MOST_PARTS:,} parts")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} deep") from None
    if _deeper_than(value, _DEEPEST):
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    if _SURROGATE.search(text) and not _is_text(json.dumps(value, ensure_ascii=False)):
        raise ValueError("it has half a surrogate pair, which is no character")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it has {twice[:80]!r} twice in one object")
    return made


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
