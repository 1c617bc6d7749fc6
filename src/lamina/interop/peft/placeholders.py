"""What stands for the parts of peft that Lamina doesn't have.

A placeholder can be imported, compared and asked for by `isinstance`; using it is one clear error.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from torch import nn

from lamina.errors import UnsupportedMethodError
from lamina.interop.peft.bases import base_of

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


def _class(where: str, name: str) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise refusal(where, name)

    def refuse_reading(cls: Any, *args: Any, **kwargs: Any) -> None:
        raise refusal(where, name)

    body = {
        "__init__": refuse,
        "__module__": where,
        "__doc__": f"`{name}` of a method that Lamina doesn't have.",
        "from_pretrained": classmethod(refuse_reading),
    }
    base = base_of(where, name)
    if issubclass(base, nn.Module):
        body["forward"] = refuse
    return type(base)(name, (base,), body)


def _function(where: str, name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise refusal(where, name)

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__module__ = where
    return refuse
