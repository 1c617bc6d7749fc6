"""A score of a model on an eval that was prepared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from lamina.training.evaluate.generating import left_as_is
from lamina.training.evaluate.material import Way
from lamina.training.evaluate.prepared import Prepared
from lamina.training.evaluate.scores import Score

_OF_TOKENIZERS = ("padding_side", "truncation_side", "pad_token", "eos_token", "chat_template")


def measure(
    prepared: Prepared,
    model: Any,
    tokenizer: Any,
    *,
    head: Literal["language", "reward"] = "language",
    batch_size: int = 8,
) -> Score | None:
    """Measure a model; it is left as it is, and so are its tokenizer and all random states.

    Args:
        prepared: of `prepare_evals`.
        model: adapted or not.
        tokenizer: that the eval was prepared with.
        head: what the model answers with: logits of tokens, or one number.
        batch_size: examples in one forward; but for rounding, no score depends on it.

    Returns:
        None if a model of this kind can't be measured so, as a reward model's loss on a text.

    Raises:
        LaminaError: a function of the user's fails, or gives what is no score.
    """
    with left_as_is(model), _unchanged(tokenizer), _same_draws():
        return prepared.material.measure(model, tokenizer, Way(head, batch_size))


@contextmanager
def _same_draws() -> Iterator[None]:
    """Python and numpy draw afterwards what they would have drawn."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _unchanged(tokenizer: Any) -> Iterator[None]:
    before = {name: getattr(tokenizer, name, None) for name in _OF_TOKENIZERS}
    try:
        yield
    finally:
        for name, value in before.items():
            if getattr(tokenizer, name, None) != value:
                setattr(tokenizer, name, value)
