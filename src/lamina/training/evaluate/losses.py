"""Cross-entropy of held-out texts and answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lamina.errors import DataError
from lamina.training.evaluate.held_out import Asked, digest_of, read_parts, sequences_of
from lamina.training.evaluate.likelihood import Labelled, negative_log_likelihoods
from lamina.training.evaluate.material import Way
from lamina.training.evaluate.scores import Score


@dataclass(frozen=True)
class Texts:
    """What a loss is measured on.

    Attributes:
        sequences: at least one label in each.
        left_out: examples without any: their answers lie behind `max_length`, for one.
    """

    sequences: tuple[Labelled, ...]
    left_out: int = 0

    @property
    def content(self) -> str:
        """A digest of what is measured."""
        return f"{digest_of(self.sequences)} {self.left_out}"

    def measure(self, model: Any, tokenizer: Any, way: Way) -> Score | None:
        """L = sum_i l_i / sum_i n_i, example i having n_i labels of l_i nats together.

        The standard error is that of a ratio of two sums over examples,
        sqrt(N / (N - 1) * sum_i (l_i - L n_i)^2) / sum_i n_i: examples are independent, the tokens
        of one aren't.

        Source: Cochran, "Sampling Techniques", 3rd ed., (6.13).
        """
        if way.head != "language":
            return None
        nats = negative_log_likelihoods(self.sequences, model, batch_size=way.batch_size)
        counts = torch.tensor([each.count for each in self.sequences], dtype=torch.float64)
        tokens = int(counts.sum())
        loss = float(nats.sum()) / tokens
        details = {"perplexity": _exp(loss), "tokens": float(tokens)}
        if self.left_out:
            details["left_out"] = float(self.left_out)
        return Score(
            metric="loss",
            value=loss,
            higher_is_better=False,
            examples=len(self.sequences),
            error=_error(nats - loss * counts, tokens),
            details=details,
        )


def prepare(asked: Asked) -> Texts:
    """The tokens of texts, conversations, or prompts and completions, and which of them count.

    Those count that a stage would be trained on: of texts and messages all but the first token, of
    prompts with completions the completions; see `Asked.settings`.

    Raises:
        DataError: the data is missing, broken or of another kind, or nothing of it counts.
    """
    parts = read_parts(asked, "sft")
    found = [Labelled.of(each[""]) for each in sequences_of(parts, asked.tokenizer)]
    kept = tuple(each for each in found if each.count)
    if not kept:
        raise DataError(
            f"No token counts: max_length: {asked.eval.max_length} leaves none of any answer.",
            cure="a larger max_length",
        )
    return Texts(kept, sum(len(each.dataset) for each in parts) - len(kept))


def _error(residuals: torch.Tensor, tokens: int) -> float | None:
    count = len(residuals)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * float(residuals.square().sum())) / tokens


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
