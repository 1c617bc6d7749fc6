"""Each kind of error that pydantic finds in a plan, as a sentence about the value."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from lamina.errors import nearest
from lamina.training.plan.document import Where
from lamina.training.plan.explained import expected
from lamina.training.plan.schema import NAME_PATTERN, Plan
from lamina.training.plan.settings import FUNCTION_PATTERN, Settings

_LONGEST = 60
_UNIONS = (Union, types.UnionType)
_PATTERNS = {
    NAME_PATTERN: "letters, digits, - and _ only, a letter or digit first",
    FUNCTION_PATTERN: "package.module:function",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "dict": "a mapping of names to values",
    "model": "a mapping of names to values",
}


def shown(value: Any) -> str:
    """A value as a message can hold it."""
    text = repr(value)
    return text if len(text) < _LONGEST else text[: _LONGEST - 3] + "..."


def hint(word: Any, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, where something is spelled nearly so."""
    close = nearest(str(word), known)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class Place:
    """Where pydantic found an error.

    Attributes:
        where: in the document, without the steps that only pydantic makes.
        part: the innermost part of the plan around it.
        kinds: of a setting that may be of several types: its annotation, which says all of them.
    """

    where: Where
    part: type[BaseModel]
    kinds: Any = None


def place_of(loc: Sequence[int | str], values: Any) -> Place:
    """Follow an error's location through the plan's types and the document's values together."""
    kind: Any = Plan
    part: type[BaseModel] = Plan
    where: Where = ()
    for step in loc:
        kind = _without_none(kind)
        if get_origin(kind) in _UNIONS:
            return Place(where, part, kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            part = kind
            field = kind.model_fields.get(str(step))
            kind = field.annotation if field else None
        elif get_origin(kind) in (list, dict):
            kind = get_args(kind)[-1]
            if isinstance(step, int) and not isinstance(values, list):
                # A single one where a list was meant.
                continue
        if step == "[key]":
            break
        where = (*where, step)
        values = _at(values, step)
    kind = _without_none(kind)
    return Place(where, part, kind if get_origin(kind) in _UNIONS else None)


def _without_none(kind: Any) -> Any:
    """A type without metadata, and without the None of what may be left out."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
            continue
        kinds = [each for each in get_args(kind) if each is not type(None)]
        if get_origin(kind) in _UNIONS and len(kinds) == 1:
            kind = kinds[0]
            continue
        return kind


def _at(values: Any, step: int | str) -> Any:
    try:
        return values[step]
    except (LookupError, TypeError):
        return None


def sentence(place: Place, error: Mapping[str, Any], values: Any) -> str:
    """What is wrong at a place: the value, and what is allowed there.

    Args:
        place: where.
        error: one of pydantic's `ValidationError.errors()`.
        values: those of the whole document.
    """
    kind, value, context = error["type"], error.get("input"), error.get("ctx") or {}
    if place.kinds is not None:
        # One message for all types that were tried, about the whole value.
        for step in place.where:
            values = _at(values, step)
        return f"must be {expected(place.kinds)}, not {shown(values)}"
    tell = _SENTENCES.get(kind)
    if tell is not None:
        return tell(place, value, context)
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]:g}, not {shown(value)}"
    family = kind.partition("_")[0]
    if family in _KINDS:
        return f"must be {_KINDS[family]}, not {shown(value)}"
    told = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"must be {told}, not {shown(value)}"


def _unknown(place: Place, value: Any, context: Mapping[str, Any]) -> str:
    name, model = str(place.where[-1]), place.part
    if model is Plan and name in Settings.model_fields:
        return "is a setting of stages: put it under defaults, or into a stage"
    if issubclass(model, Settings) and name in Plan.model_fields:
        return "is a setting of the plan as a whole: put it at the top"
    return "is unknown" + hint(name, model.model_fields)


def _of_choices(place: Place, value: Any, context: Mapping[str, Any]) -> str:
    words = str(context["expected"]).replace(" or ", ",").split(",")
    known = [word.strip(" '") for word in words]
    return f"{shown(value)} is none of {', '.join(known)}{hint(value, known)}"


def _of_pattern(place: Place, value: Any, context: Mapping[str, Any]) -> str:
    return f"must be {_PATTERNS[context['pattern']]}, not {shown(value)}"


_SENTENCES: dict[str, Callable[[Place, Any, Mapping[str, Any]], str]] = {
    "extra_forbidden": _unknown,
    "missing": lambda place, value, context: "is missing",
    "literal_error": _of_choices,
    "string_pattern_mismatch": _of_pattern,
    "string_too_short": lambda place, value, context: "is empty",
    "too_short": lambda place, value, context: f"is empty: give {context['min_length']} or more",
    "string_too_long": lambda place, value, context: (
        f"must have at most {context['max_length']} characters, not {len(value)}: {shown(value)}"
    ),
    "no_number": lambda place, value, context: f"must be a number, not {shown(value)}",
}
