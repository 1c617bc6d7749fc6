"""Which of two answers a model prefers: the likelier one, or the one with the larger reward."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import DataError
from lamina.training.data.tokens import Sequences
from lamina.training.evaluate.held_out import Asked, Part, digest_of, read_parts, sequences_of
from lamina.training.evaluate.likelihood import Labelled, negative_log_likelihoods
from lamina.training.evaluate.material import Way, share_error
from lamina.training.evaluate.scores import Score


@dataclass(frozen=True)
class Pairs:
    """Answers to prefer and to avoid, as one kind of model reads them.

    Attributes:
        chosen: with their prompts; the labels are the answers.
        rejected: likewise.
        left_out: pairs that are too long.
    """

    chosen: tuple[Labelled, ...]
    rejected: tuple[Labelled, ...]
    left_out: int = 0


@dataclass(frozen=True)
class Preferences:
    """What an accuracy is measured on.

    Attributes:
        answers: for models that write.
        scored: for reward models, in a plan that makes one.
    """

    answers: Pairs
    scored: Pairs | None = None

    @property
    def content(self) -> str:
        """A digest of what is measured."""
        told = hashlib.sha256()
        for pairs in filter(None, (self.answers, self.scored)):
            told.update(digest_of((*pairs.chosen, *pairs.rejected)).encode())
            told.update(f" {pairs.left_out} ".encode())
        return told.hexdigest()

    def measure(self, model: Any, tokenizer: Any, way: Way) -> Score | None:
        """The share of pairs whose margin is positive; a margin of 0 counts half.

        The margin of a model that writes is log p(chosen | prompt) - log p(rejected | prompt), each
        summed over the tokens of the answer with its end, in nats. Of a reward model it is the
        difference of the two numbers that it gives.
        """
        pairs = self.answers if way.head == "language" else self.scored
        if pairs is None:
            return None
        values = _log_likelihoods if way.head == "language" else _rewards
        both = (*pairs.chosen, *pairs.rejected)
        chosen, rejected = values(both, model, tokenizer, way.batch_size).chunk(2)
        margins = chosen - rejected
        accuracy = float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean())
        details = {"margin": float(margins.mean())}
        if pairs.left_out:
            details["left_out"] = float(pairs.left_out)
        return Score(
            metric="accuracy",
            value=accuracy,
            higher_is_better=True,
            examples=len(margins),
            error=share_error(accuracy, len(margins)),
            details=details,
        )


def prepare(asked: Asked) -> Preferences:
    """The tokens of both answers of each pair.

    As in training, dpo cuts at `max_length`, and leaves out pairs whose prompts are as long; a
    reward model's longer pairs are left out. So are pairs of which the cut leaves nothing that
    differs.

    Raises:
        DataError: the data is missing, broken or of another kind, or no pair is left.
    """
    answers = _pairs(asked, read_parts(asked, "dpo"))
    stages = asked.plan.stages
    rewards = any(asked.plan.settings_of(each).method == "reward" for each in stages)
    return Preferences(answers, _pairs(asked, read_parts(asked, "reward")) if rewards else None)


def _pairs(asked: Asked, parts: Sequence[Part]) -> Pairs:
    found = [each for each in sequences_of(parts, asked.tokenizer) if _differ(each)]
    if not found:
        length = asked.eval.max_length
        raise DataError(
            f"No pair is left: max_length: {length} leaves nothing of any that differs.",
            cure="a larger max_length",
        )
    return Pairs(
        tuple(Labelled.of(each["chosen"]) for each in found),
        tuple(Labelled.of(each["rejected"]) for each in found),
        sum(len(each.dataset) for each in parts) - len(found),
    )


def _differ(pair: Sequences) -> bool:
    return pair["chosen"] != pair["rejected"]


def _log_likelihoods(
    sequences: Sequence[Labelled], model: Any, tokenizer: Any, batch_size: int
) -> Tensor:
    return -negative_log_likelihoods(sequences, model, batch_size=batch_size)


def _rewards(sequences: Sequence[Labelled], model: Any, tokenizer: Any, batch_size: int) -> Tensor:
    """The number that a reward model gives to each sequence, in fp64.

    It is read at the last token that isn't the padding token, as in training: where that is the end
    token too, at the one before the end.
    """
    found = torch.zeros(len(sequences), dtype=torch.float64)
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place].ids))
    device = next(model.parameters()).device
    with _padded_with(_padding(tokenizer), model) as pad:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            rows = [sequences[place].ids.long() for place in places]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
            sizes = torch.tensor([len(row) for row in rows])
            mask = (torch.arange(ids.shape[1]) < sizes[:, None]).long()
            said = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            found[places] = said.logits.squeeze(-1).cpu().double()
    return found


def _padding(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


@contextmanager
def _padded_with(pad: int, model: Any) -> Iterator[int]:
    """The model's config says what padding is, as TRL's trainer lets it say."""
    config = model.config.get_text_config()
    before = config.pad_token_id
    config.pad_token_id = pad
    try:
        yield pad
    finally:
        config.pad_token_id = before
