"""A tokenizer that is made in place, and rows of text, for models of `models.VOCABULARY` words."""

from __future__ import annotations

from typing import Any

import tokenizers
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from tests import models

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [f"w{number}" for number in range(models.VOCABULARY - len(SPECIAL))]
TURN = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """Words to ids, with the special tokens of the tiny models."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TURN, **names)


def sentence(start: int, length: int = 6, step: int = 1) -> str:
    """Words that follow from one another."""
    return " ".join(WORDS[(start + step * place) % len(WORDS)] for place in range(length))


def rows(count: int = 8, **columns: Any) -> Dataset:
    """A data set of `count` rows; each column is made from the number of the row."""
    return Dataset.from_list(
        [{name: make(row) for name, make in columns.items()} for row in range(count)]
    )


def texts() -> Dataset:
    """Plain texts."""
    return rows(text=lambda row: sentence(row, 10))


def preferences() -> Dataset:
    """Prompts with an answer to prefer and one to avoid."""
    return rows(
        prompt=sentence,
        chosen=lambda row: " " + sentence(row + 6),
        rejected=lambda row: " " + sentence(row + 9, step=3),
    )


def judged() -> Dataset:
    """Prompts with an answer and whether it is wanted."""
    return rows(
        prompt=sentence,
        completion=lambda row: " " + sentence(row + 6, step=1 + 2 * (row % 2)),
        label=lambda row: row % 2 == 0,
    )
