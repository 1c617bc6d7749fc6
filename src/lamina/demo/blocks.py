"""Token blocks of equal length, and how well a model foresees them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def blocks(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, limit: int | None = None
) -> torch.Tensor:
    """The text as token blocks: int64, (n, length), n <= limit; a short rest is left out.

    Raises:
        ValueError: the text has fewer than `length` tokens.
    """
    # verbose=False: the text is cut here, so being longer than the model's context is no news.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"{len(ids)} tokens do not fill one block of {length}")
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


@torch.no_grad()
def perplexity(model: torch.nn.Module, data: torch.Tensor, batch_size: int = 16) -> float:
    """The exponential of the mean negative log-likelihood per predicted token.

    Every block is read on its own: its first token is given, the others are predicted.
    The model is one of transformers' causal language models; it is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in data.split(batch_size):
        # Every block predicts equally many tokens, so a batch's mean weighs by its blocks.
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    model.train(was_training)
    return math.exp(total / len(data))
