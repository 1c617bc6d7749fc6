"""Prompts of a file: one per line, or as settings in JSON lines; needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lamina.errors import DataError
from lamina.training.plan.schema import Prompt

# What data sets call a prompt.
_TEXTS = ("text", "prompt")


def prompts_of(texts: list[str], **settings: Any) -> list[Prompt]:
    """Prompts with these texts; settings that are None are the usual ones.

    Raises:
        DataError: one is empty.
    """
    return [
        _prompt({"text": text}, settings, f"prompt {number}")
        for number, text in enumerate(texts, 1)
    ]


def read_prompts(file: str | Path, **settings: Any) -> list[Prompt]:
    """The prompts of a file: its lines, or of `.jsonl` the objects with a `text` or `prompt`.

    Args:
        file: empty lines in it are left out.
        settings: of all prompts that don't say otherwise themselves.

    Raises:
        DataError: it can't be read, or has lines that are no prompts; all of them are named.
    """
    path = Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} can't be read: {error}.", cure="a file of text, with a prompt in each line"
        ) from error
    found, faults = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            told = _of_json(line) if path.suffix == ".jsonl" else {"text": line}
            found.append(_prompt(told, settings, f"line {number}"))
        except DataError as error:
            faults.append(error.what)
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults or not found:
        raise DataError(
            f"{path} has {'lines that are no prompts' if faults else 'no prompts'}.",
            faults=faults[:20],
            cure='lines of text, or of JSON such as {"text": "Hello", "max_new_tokens": 32}',
        )
    return found


def _of_json(line: str) -> dict[str, Any]:
    told = json.loads(line)
    if isinstance(told, str):
        return {"text": told}
    if not isinstance(told, dict):
        raise ValueError("it is neither an object nor a text")
    name = next((each for each in _TEXTS if each in told), None)
    if name is None:
        raise ValueError(f"it has neither {' nor '.join(map(repr, _TEXTS))}")
    return {"text" if key == name else key: value for key, value in told.items()}


def _prompt(told: dict[str, Any], settings: dict[str, Any], where: str) -> Prompt:
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        return Prompt.model_validate({**given, **told})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{where}: {name}: {first['msg']}", cure="a text, max_new_tokens, chat: true or false"
        ) from error
