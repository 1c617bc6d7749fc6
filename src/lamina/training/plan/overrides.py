"""`key=value` on the command line, over what the file says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from lamina.training.plan.document import Document, Fault, Where
from lamina.training.plan.settings import Settings


def apply(document: Document, overrides: Sequence[str]) -> list[Fault]:
    """Put `KEY=VALUE` into a document; returns what can't be.

    KEY is dotted: `stages.chat.learning_rate` (a stage by its name or number), `defaults.lora_r`,
    `output_dir`; a setting of stages alone, `learning_rate`, means `defaults.learning_rate`. VALUE
    is YAML.
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
        else:
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[key]
    document.overridden.add(where)
    return None


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
