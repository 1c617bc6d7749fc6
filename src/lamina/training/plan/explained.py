"""What every setting of a plan is, and takes, in words: from docstrings and annotations alone."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

_WORDS: dict[Any, tuple[str, str]] = {
    str: ("a text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "switches"),
    Any: ("a value", "values"),
}
_BEGINS = re.compile(r" {4}(\w+): (.*)")


def described(model: type[BaseModel]) -> dict[str, str]:
    """Field -> what the docstrings of a part of the plan say of it, in one line."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, BaseModel):
            found.update(_attributes(kind))
    return {name: text for name, text in found.items() if name in model.model_fields}


def _attributes(kind: type) -> dict[str, str]:
    body = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in body.splitlines():
        begins = _BEGINS.fullmatch(line)
        if begins:
            name, found[begins[1]] = begins[1], begins[2]
        elif line.strip() and name:
            found[name] += " " + line.strip()
    return found


def expected(annotation: Any, *, several: bool = False) -> str:
    """What a setting takes, from its annotation: `"a text or a list of texts"`.

    Args:
        annotation: of a field, as pydantic holds it.
        several: speak of more than one of them.
    """
    words = list(dict.fromkeys(_kinds(annotation, several)))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _kinds(annotation: Any, several: bool) -> Iterator[str]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        said = next((each for each in inner[1:] if isinstance(each, Said)), None)
        yield from [said.words[several]] if said else _kinds(inner[0], several)
    elif origin in (Union, types.UnionType):
        for each in inner:
            yield from () if each is type(None) else _kinds(each, several)
    elif origin is Literal:
        yield from map(str, inner)
    elif origin is list:
        yield f"{'lists' if several else 'a list'} of {expected(inner[0], several=True)}"
    elif origin is dict:
        keys, values = (expected(each, several=True) for each in inner)
        keys = keys.replace("texts", "names")
        yield f"{'mappings' if several else 'a mapping'} of {keys} to {values}"
    elif annotation is bool and not several:
        yield from ("true", "false")
    else:
        yield _words(annotation)[several]


def _words(kind: Any) -> tuple[str, str]:
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        return "a mapping of settings", "mappings of settings"
    return _WORDS[kind]


class Said:
    """Words for a type that its annotation doesn't show: one of it, and several."""

    def __init__(self, one: str, several: str) -> None:
        self.words = (one, several)
