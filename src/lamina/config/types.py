"""Whether the values of a config are of the types that its fields are annotated with."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

_NOTHING = type(None)
_SERIES = (list, tuple, set, frozenset)


def set_strange_aside(config: Any) -> dict[str, str]:
    """A line for each field whose value is of a wrong type, by the field's name.

    Such a field is given its default, so that the other checks can go on: a config with such
    lines has to be refused. What is made of plain values stays, as those checks know it better.
    """
    lines = {}
    hints = _hints(cast("Hashable", type(config)))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not field.init or fits(value, hints[field.name]):
            continue
        wanted = str(field.type).replace("methods.", "")
        lines[field.name] = f"{field.name}={reprlib.repr(value)}: {wanted} was expected"
        if not _is_plain(value):
            setattr(config, field.name, _default(field))
    return lines


def merged(faults: Sequence[str], strange: dict[str, str]) -> list[str]:
    """All faults; of a field that has one already, what its type should be goes unsaid."""
    text = "\n".join(faults)
    told = [line for name, line in strange.items() if not re.search(rf"\b{name}\b", text)]
    return [*faults, *told]


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type: an int is a float too, None a bool that is off."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in _PARTS:
        return _PARTS[origin](value, parts)
    check = _SINGLE.get(hint)
    return check(value) if check else isinstance(value, hint)


def _is_pair(value: object, parts: tuple[Any, ...]) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != len(parts):
        return False
    return all(fits(item, part) for item, part in zip(value, parts, strict=True))


def _is_table(value: object, parts: tuple[Any, ...]) -> bool:
    return isinstance(value, dict) and all(
        fits(key, parts[0]) and fits(item, parts[1]) for key, item in value.items()
    )


def _is_series(value: object, parts: tuple[Any, ...]) -> bool:
    return isinstance(value, _SERIES) and all(fits(item, parts[0]) for item in value)


def _is_one_of(value: object, parts: tuple[Any, ...]) -> bool:
    return any(fits(value, part) for part in parts)


def _is_plain(value: object) -> bool:
    """Whether a value is made of what JSON knows, or of the settings of a method."""
    if isinstance(value, _SERIES):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    settings = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return settings or isinstance(value, (str, int, float, os.PathLike, _NOTHING))


_PARTS: dict[Any, Callable[[object, tuple[Any, ...]], bool]] = {
    list: _is_series,
    set: _is_series,
    tuple: _is_pair,
    dict: _is_table,
    typing.Union: _is_one_of,
    types.UnionType: _is_one_of,
}
_SINGLE: dict[Any, Callable[[object], bool]] = {
    Any: _is_plain,
    str: lambda value: isinstance(value, (str, os.PathLike)),
    int: lambda value: isinstance(value, int) and not isinstance(value, bool),
    float: lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    bool: lambda value: isinstance(value, (bool, _NOTHING)),
}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(kind)
