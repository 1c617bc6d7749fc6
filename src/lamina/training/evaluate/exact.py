"""Whether a model writes just the answers that are expected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lamina.training.evaluate.held_out import Asked
from lamina.training.evaluate.material import Way, share_error
from lamina.training.evaluate.prompted import Prompts, figures, read_prompts
from lamina.training.evaluate.scores import Score


@dataclass(frozen=True)
class Expected:
    """Prompts, each with the answer that is expected.

    Attributes:
        prompts: at least one.
    """

    prompts: Prompts

    @property
    def content(self) -> str:
        """A digest of what is measured."""
        return self.prompts.content

    def measure(self, model: Any, tokenizer: Any, way: Way) -> Score | None:
        """The share of prompts whose greedy answers are those that are expected; see `same`."""
        if way.head != "language":
            return None
        answers, _ = self.prompts.answers(model, tokenizer, way.batch_size)
        pairs = zip(answers, self.prompts.prompts, strict=True)
        hits = sum(same(answer.text, prompt.expected or "") for answer, prompt in pairs)
        share = hits / len(answers)
        return Score(
            metric="exact_match",
            value=share,
            higher_is_better=True,
            examples=len(answers),
            error=share_error(share, len(answers)),
            details=figures(answers),
        )


def prepare(asked: Asked) -> Expected:
    """Prompts with completions, or conversations that end in an answer.

    Raises:
        DataError: the data is missing, broken or of another kind, or has no answers.
    """
    return Expected(read_prompts(asked, all_expected=True))


def same(answer: str, expected: str) -> bool:
    """Whether two texts are the same but for white space.

    What is around them doesn't count, and any run of it within them counts as one space; case,
    punctuation and all else do.
    """
    return answer.split() == expected.split()
