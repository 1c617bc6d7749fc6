"""What a run has noted, read back: of the types that it should be, whoever wrote it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lamina.errors import RunError

_T = TypeVar("_T")


def understood(value: _T, file: Path, *, cure: str) -> _T:
    """The same, with numbers that stand there as words as numbers.

    Args:
        value: a dataclass, as the JSON of `file` has it.
        file: that it was read from.
        cure: how to do without it.

    Raises:
        RunError: with all that is of another type than it should be.
    """
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
