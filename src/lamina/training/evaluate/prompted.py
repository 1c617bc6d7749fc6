"""What a model answers to held-out prompts, and what is expected of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from lamina.errors import DataError
from lamina.training.data.chat import check_template
from lamina.training.data.conversation import BrokenRow, Message
from lamina.training.data.tokens import tokenize_prompts
from lamina.training.evaluate.answers import answer_of, as_text
from lamina.training.evaluate.generating import end_tokens, generate
from lamina.training.evaluate.held_out import Asked, Part, read_parts
from lamina.training.evaluate.scores import Answer
from lamina.training.plan.settings import Method

_TOLD = 5
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        asked: a text, or messages up to where the assistant answers.
        ids: its tokens.
        expected: the answer, as a text; None if the data has none.
        columns: what else the data says of it.
    """

    asked: str | list[Message]
    ids: tuple[int, ...]
    expected: str | None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompts:
    """Prompts that a model is to answer.

    Attributes:
        prompts: at least one.
        max_new_tokens: of an answer.
    """

    prompts: tuple[Prompt, ...]
    max_new_tokens: int

    @property
    def content(self) -> str:
        """A digest of prompts, expected answers and all that belongs to them."""
        told = hashlib.sha256(f"{self.max_new_tokens}\0".encode())
        for each in self.prompts:
            row = [each.asked, each.ids, each.expected, each.columns]
            told.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\0")
        return told.hexdigest()

    def answers(
        self, model: Any, tokenizer: Any, batch_size: int
    ) -> tuple[list[Answer], list[list[int]]]:
        """What a model answers, greedily: in words, and as tokens with the end token."""
        told = generate(
            model,
            tokenizer,
            [each.ids for each in self.prompts],
            max_new_tokens=self.max_new_tokens,
            batch_size=batch_size,
        )
        ends = end_tokens(model, tokenizer)
        return [answer_of("", tokens, tokenizer, ends) for tokens in told], told


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """The mean number of tokens of an answer, and the share of answers that ended by themselves."""
    return {
        "tokens": sum(each.tokens for each in answers) / len(answers),
        "ended": sum(each.ended for each in answers) / len(answers),
    }


def read_prompts(asked: Asked, *, all_expected: bool) -> Prompts:
    """Prompts with what is expected: of completions, or of the end of conversations.

    A conversation's prompt is all before the last that its assistant says.

    Args:
        asked: the eval.
        all_expected: whether prompts without answers are refused; then nothing else is read of the
            data but prompts and answers.

    Raises:
        DataError: the data is missing, broken or of another kind, an answer is no text, or prompts
            are longer than `max_length`: they are never cut.
    """
    methods: tuple[Method, ...] = ("sft",) if all_expected else ("sft", "grpo")
    parts = read_parts(asked, *methods, masked=False)
    faults = [f"{_path(part)} holds texts; there is no prompt" for part in parts if _texts(part)]
    found: list[Prompt] = []
    for part in parts if not faults else ():
        others = repeat(_NOTHING) if all_expected else _others(part)
        for number, (row, columns) in enumerate(zip(part.dataset, others, strict=False), 1):
            try:
                found.append(_prompt(row, columns, part, asked))
            except BrokenRow as error:
                faults.append(f"{_path(part)}, example {number}: {error}")
    if faults:
        more = [f"and {len(faults) - _TOLD:,} more"] if len(faults) > _TOLD else []
        raise DataError(
            "These can't be asked and compared.",
            faults=[*faults[:_TOLD], *more],
            cure="mend these in the data, or a larger max_length where that is exceeded",
        )
    return Prompts(tuple(found), asked.eval.max_new_tokens)


def _prompt(row: Mapping[str, Any], columns: Mapping[str, Any], part: Part, asked: Asked) -> Prompt:
    prompt, expected = _parted(row)
    if isinstance(prompt, str):
        ids = as_text(prompt, asked.tokenizer)
    else:
        check_template({"prompt": prompt}, asked.tokenizer)
        told = {**row, "prompt": prompt}
        ids = list(tokenize_prompts([told], part.settings, asked.tokenizer)[0].ids)
    if not ids:
        raise BrokenRow("the prompt has no tokens")
    if len(ids) > asked.eval.max_length:
        raise BrokenRow(
            f"the prompt has {len(ids):,} tokens, more than max_length: {asked.eval.max_length}; "
            "prompts aren't cut"
        )
    return Prompt(prompt, tuple(ids), expected, columns)


def _parted(row: Mapping[str, Any]) -> tuple[str | list[Message], str | None]:
    """A prompt, and the answer that is expected."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"], row.get("completion")
    talk = row["messages"] if "messages" in row else row["prompt"] + row.get("completion", [])
    if "messages" not in row and "completion" not in row:
        return talk, None
    last = max(place for place, each in enumerate(talk) if each["role"] == "assistant")
    if not last:
        raise BrokenRow("the assistant speaks first: there is no prompt")
    answer = talk[last]
    if not answer["content"].strip():
        raise BrokenRow("the last answer of the assistant is no text")
    return talk[:last], answer["content"]


def _others(part: Part) -> Iterator[Mapping[str, Any]]:
    if part.settings.method == "sft":
        yield from part.dropped()
        return
    for row in part.dataset:
        yield {name: value for name, value in row.items() if name != "prompt"}


def _texts(part: Part) -> bool:
    return "text" in part.dataset.column_names and part.settings.method == "sft"


def _path(part: Part) -> str:
    return part.examples.source.data.path
