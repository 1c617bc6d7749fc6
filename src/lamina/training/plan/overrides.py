"""`key=value` on the command line, over what the file says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from lamina.training.plan.document import Document, Fault, Where
from lamina.training.plan.schema import ONE_OF
from lamina.training.plan.settings import Settings


def apply(document: Document, overrides: Sequence[str]) -> list[Fault]:
    """Put `KEY=VALUE` into a document; returns what can't be.

    KEY is dotted: `stages.chat.learning_rate` (a stage by its name or number), `defaults.lora_r`,
    `output_dir`; a setting of stages alone, `learning_rate`, means `defaults.learning_rate`. VALUE
    is YAML. Of two settings that exclude each other, such as `max_steps` and `num_train_epochs`,
    the one that is given here holds.
    """
    faults: list[Fault] = []
    for text in overrides:
        key, equals, written = text.removeprefix("--").partition("=")
        if not equals or not key:
            document.unread.add(text)
            faults.append(((text,), "is no KEY=VALUE"))
            continue
        try:
            value = yaml.safe_load(written)
        except yaml.YAMLError:
            value = written
        told = _put(document, key.replace("-", "_").split("."), value)
        if told:
            document.unread.add(text)
            faults.append(((text,), told))
    return faults


def _put(document: Document, path: list[str], value: Any) -> str | None:
    if document.values is None:
        document.values = {}
    if len(path) == 1 and path[0] in Settings.model_fields:
        path = ["defaults", *path]
    here: Any = document.values
    where: Where = ()
    for step, name in enumerate(path):
        key = _key(here, name)
        if key is None:
            return f"there is no {'.'.join(path[: step + 1])}"
        where = (*where, key)
        if step == len(path) - 1:
            here[key] = value
            _give_way(document, here, where)
        else:
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[key]
    document.overridden.add(where)
    return None


def _give_way(document: Document, here: Any, where: Where) -> None:
    """Of two that exclude each other, the one on the command line holds."""
    for pair in ONE_OF:
        if where[-1] in pair and isinstance(here, dict):
            (other,) = (name for name in pair if name != where[-1])
            if (*where[:-1], other) not in document.overridden:
                here.pop(other, None)


def _key(here: Any, name: str) -> str | int | None:
    """The key, or place in a list, that a part of a path means."""
    if isinstance(here, dict):
        return name
    if not isinstance(here, list):
        return None
    named = [
        i for i, each in enumerate(here) if isinstance(each, dict) and each.get("name") == name
    ]
    if named:
        return named[0]
    return int(name) if name.isdigit() and int(name) < len(here) else None
