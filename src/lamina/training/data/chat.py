"""Chat templates: the one of a plan, and whether a stage's examples can be rendered with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lamina.errors import DataError
from lamina.extras import require
from lamina.training.plan.located import place_of
from lamina.training.plan.settings import Settings

_CONVERSATIONS = ("messages", "prompt", "chosen", "completion")


def is_conversation(example: Mapping[str, Any]) -> bool:
    """Whether an example for a trainer is made of messages."""
    return any(isinstance(example.get(name), list) for name in _CONVERSATIONS)


def read_template(told: str, root: str | os.PathLike[str] = ".") -> str:
    """The template that a plan's `chat_template` means: of a file, or the text itself.

    Raises:
        DataError: it is neither.
    """
    if "{%" in told or "{{" in told:
        return told
    place = place_of(told, Path(root))
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"chat_template: {told} is neither a template nor a file that can be read: {error}.",
            cure="a path from the plan's folder, or the template's text",
        ) from error


def check_rendering(example: Mapping[str, Any], tokenizer: Any, settings: Settings) -> None:
    """Refuse what a stage's trainer would stumble over, or not obey.

    Args:
        example: the first one, as the trainer takes it.
        tokenizer: with its chat template.
        settings: of the stage.

    Raises:
        DataError: there is no chat template and there are conversations, no end-of-text token and
            there are texts, or a choice of what is trained that these examples have no meaning for.
    """
    talk = is_conversation(example)
    faults = [] if settings.method != "sft" else list(_loss_faults(example, talk, settings))
    cure = "leave it out, or lay the data out as it needs" if faults else None
    if talk and not tokenizer.chat_template:
        faults.append("the examples are conversations, and the tokenizer has no chat template")
        cure = "chat_template: in the plan, a file or the text of a Jinja template"
    elif talk and settings.assistant_only_loss:
        told = _marker_fault(tokenizer)
        if told:
            faults.append(told)
            cure = "chat_template: one with {% generation %} ... {% endgeneration %} around answers"
    if not talk and settings.method != "grpo" and not tokenizer.eos_token:
        faults.append("the examples are texts, and the tokenizer has no token that ends them")
        cure = "a tokenizer with an eos_token"
    if faults:
        raise DataError("These examples can't be trained on as asked.", faults=faults, cure=cure)


def check_template(example: Mapping[str, Any], tokenizer: Any) -> None:
    """Render the conversations of an example, which a template may refuse.

    Raises:
        DataError: with what the template says.
    """
    if not is_conversation(example):
        return
    asked = example.get("prompt") or []
    answers = [example[key] for key in ("completion", "chosen", "rejected") if key in example]
    talks = [example.get("messages"), asked, *(asked + answer for answer in answers)]
    for talk in talks:
        try:
            if talk:
                tokenizer.apply_chat_template(talk, tokenize=False)
        except Exception as error:
            # Templates raise whatever Jinja and their authors like.
            cure = "another chat_template, or conversations that it takes"
            raise unrendered(talk, error, cure) from error


def unrendered(talk: Iterable[Mapping[str, Any]], error: Exception, cure: str) -> DataError:
    """What is told of a conversation that a chat template can't render."""
    roles = ", ".join(each["role"] for each in talk)
    return DataError(
        f"The chat template can't render a conversation of {roles}: {error}.", cure=cure
    )


def _loss_faults(example: Mapping[str, Any], talk: bool, settings: Settings) -> list[str]:
    faults = []
    if settings.assistant_only_loss and not talk:
        faults.append("assistant_only_loss: these examples are no conversations")
    if settings.completion_only_loss and "completion" not in example:
        instead = "assistant_only_loss is for these" if talk else "these are plain texts"
        faults.append(f"completion_only_loss: there is no prompt with a completion; {instead}")
    return faults


def _marker_fault(tokenizer: Any) -> str | None:
    """What TRL would say, when it makes a trainer, of a template without marks of answers."""
    templates = require("trl.chat_template_utils", "train")
    if templates.has_generation_markers(tokenizer.chat_template):
        return None
    try:
        templates.get_training_chat_template(tokenizer)
    except Exception as error:
        return (
            "assistant_only_loss: the chat template doesn't mark what the assistant says, and is "
            f"none that TRL knows how to mark ({type(error).__name__})"
        )
    return None
