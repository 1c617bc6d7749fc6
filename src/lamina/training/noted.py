"""What a run has noted, read back: of the types that it should be, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lamina.errors import RunError

_T = TypeVar("_T")


def read_notes(file: Path, version: int, made: Callable[[dict[str, Any]], _T], *, cure: str) -> _T:
    """What a file of JSON says, as a dataclass; numbers that stand there as words as numbers.

    Args:
        file: what was noted.
        version: the one that this version writes.
        made: from what is in it to the dataclass.
        cure: how to do without the file.

    Raises:
        RunError: it is broken or from a newer version, with all that is of another type than it
            should be.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told["format"] != version:
            raise ValueError(f"it has format {told['format']}, this version reads {version}")
        found = made(told)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{file} can't be read: {error}.", cure=cure) from error
    return _understood(found, file, cure)


def _understood(value: _T, file: Path, cure: str) -> _T:
    written: Any = value
    try:
        found: _T = TypeAdapter(type(value)).validate_python(asdict(written))
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}"
            for each in error.errors(include_url=False, include_input=False)
        ]
        raise RunError(f"{file} makes no sense.", faults=faults, cure=cure) from error
    return found
