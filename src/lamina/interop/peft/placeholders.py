"""What stands for the parts of peft that Lamina doesn't have.

A placeholder can be imported, compared and asked for by `isinstance`; using it is one clear error.
Configs can be built too, since they are read from files and held by modules; applying one is the
error.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

from torch import nn

from lamina.errors import UnsupportedMethodError
from lamina.interop.peft.bases import base_of
from lamina.interop.peft.config import PeftConfig

# Enumerations that scripts and tests read the members of, at import.
_CHOICES = {
    "PromptTuningInit": ("TEXT", "SAMPLE_VOCAB", "RANDOM"),
    "PromptEncoderReparameterizationType": ("MLP", "LSTM"),
    "MultitaskPromptTuningInit": (
        "TEXT",
        "RANDOM",
        "AVERAGE_SOURCE_TASKS",
        "EXACT_SOURCE_TASK",
        "ONLY_SOURCE_SHARED",
    ),
}


def refusal(where: str, name: str) -> UnsupportedMethodError:
    """The error that using `name` of the module `where` ends in."""
    return UnsupportedMethodError(
        f"{name} ({where}) isn't there: Lamina stands in for peft, and knows LoRA only.",
        cure="use LoraConfig; or, for this method, the real peft: install it, and leave out "
        "lamina.interop.peft.install() or `lamina as-peft` (uninstall() takes it back)",
    )


def placeholder(where: str, name: str) -> Any:
    """Something of the right kind for a name: a class, a function, an enumeration or a table."""
    if name in _CHOICES:
        members = [(choice, choice) for choice in _CHOICES[name]]
        return enum.Enum(name, members, type=str, module=where)
    if name.isupper():
        return {}
    if name.lstrip("_")[:1].isupper():
        return _class(where, name)
    return _function(where, name)


def refuse_foreign(config: Any) -> None:
    """Raise if a config is of a method that Lamina doesn't have.

    Raises:
        UnsupportedMethodError: it is.
    """
    refuse = getattr(config, "refuse", None)
    if callable(refuse):
        refuse()


def _class(where: str, name: str) -> type:
    """A class that can't be built; a config can, and is refused when it is applied."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise refusal(where, name)

    base = base_of(where, name)
    body: dict[str, Any] = {
        "__init__": refuse,
        "__module__": where,
        "__doc__": f"`{name}` of a method that Lamina doesn't have.",
    }
    if issubclass(base, PeftConfig):
        body.update(__init__=_remember, to_dict=_remembered, peft_method=_method(where))
        body.update(refuse=refuse)
    elif issubclass(base, nn.Module):
        body.update(forward=refuse)
    return type(base)(name, (base,), body)


def _method(where: str) -> str:
    return where.split(".")[2].upper() if where.count(".") > 1 else ""


def _remember(self: Any, *args: Any, **kwargs: Any) -> None:
    """Hold the settings: files with them can be read, and modules that name them imported."""
    for entry in dataclasses.fields(PeftConfig):
        setattr(self, entry.name, entry.default)
    self.peft_type = self.peft_method
    self.settings = kwargs
    for name, value in kwargs.items():
        setattr(self, name, value)


def _remembered(self: Any) -> dict[str, Any]:
    own = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(PeftConfig)}
    return {**own, **self.settings, "peft_type": str(self.peft_type)}


def _function(where: str, name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise refusal(where, name)

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__module__ = where
    return refuse
