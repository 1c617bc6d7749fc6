"""How likely a model takes sequences to be, without the logits of all their tokens at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamina.training.data.tokens import Tokens
from lamina.training.evaluate.generating import root_of

# Logits that are held at once: 128 MiB in fp32, at 223 tokens of a vocabulary of 150,000.
_LOGITS = 1 << 25


@dataclass(frozen=True)
class Labelled:
    """A sequence of which some tokens count.

    Attributes:
        ids: tokens, int32.
        labels: bool: which of them are looked at. The first never is: nothing is before it.
    """

    ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, tokens: Tokens) -> Labelled:
        """What a trainer sees of an example."""
        labels = torch.tensor(tokens.trained, dtype=torch.bool)
        labels[:1] = False
        return cls(torch.tensor(tokens.ids, dtype=torch.int32), labels)

    @property
    def count(self) -> int:
        """How many tokens are looked at."""
        return int(self.labels.sum())


@torch.no_grad()
def negative_log_likelihoods(
    sequences: Sequence[Labelled], model: nn.Module, *, batch_size: int
) -> Tensor:
    """-sum over the labels t of a sequence of log p(x_t | x_<t), in nats, of each sequence.

    Hidden states are computed a batch at a time, `batch_size x length x hidden` in the model's
    dtype; logits of the labels alone, and at most 2^25 of them at once: 128 MiB in fp32, beside
    as much again for the softmax and a copy in the model's dtype. Log probabilities are taken in
    fp32 and summed in fp64. A model that doesn't call its own `base_model` gives the logits of a
    whole batch in its own dtype.

    Args:
        sequences: of any lengths; a batch is padded at its right, which no label sees.
        model: a causal language model, in eval mode.
        batch_size: sequences in one forward; nothing but rounding depends on it.

    Returns:
        fp64, on the CPU, in the order of `sequences`.
    """
    found = torch.zeros(len(sequences), dtype=torch.float64)
    # Sequences of a length lie in one batch: little of it is padding.
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place].ids))
    chunk = _chunk(model)
    with _in_two_steps(model) as steps:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            found[places] = _of_batch([sequences[place] for place in places], steps, chunk)
    return found


class _Steps:
    """The hidden states of a batch, then logits of some of them.

    Both are forwards of the whole model, so that whatever it does with logits is done: scaling,
    soft caps. In the first its body runs, and its head sees one token; in the others its body gives
    what it gave before. Where a model doesn't go by its body, the first gives all logits.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any] | None) -> None:
        self._model, self._run = model, run
        self._device = next(model.parameters()).device
        self._ids = self._all = torch.empty(0)
        self._hidden: Tensor | None = None
        self._given: Tensor | None = None
        self._output: Any = None

    def body(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for the forward of the body."""
        assert self._run is not None
        if self._given is not None:
            self._output.last_hidden_state = self._given
            return self._output
        self._output = self._run(*args, **kwargs)
        self._hidden = getattr(self._output, "last_hidden_state", None)
        if self._hidden is not None:
            self._output.last_hidden_state = self._hidden[:, :1]
        return self._output

    def read(self, ids: Tensor, mask: Tensor) -> None:
        """Take a batch in."""
        self._ids = ids.to(self._device)
        self._hidden = self._given = None
        mask = mask.to(self._device)
        self._all = self._model(input_ids=self._ids, attention_mask=mask, use_cache=False).logits

    def logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        """What is said at these places of the batch, places x vocabulary."""
        if self._hidden is None:
            return _at(self._all, rows, columns)
        self._given = _at(self._hidden, rows, columns)[None]
        ids = _at(self._ids, rows, columns)[None]
        logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        return logits


def _at(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return values[rows.to(values.device), columns.to(values.device)]


@contextmanager
def _in_two_steps(model: Any) -> Iterator[_Steps]:
    whole = root_of(model)
    body = getattr(whole, "base_model", whole)
    if body is whole or not isinstance(body, nn.Module):
        yield _Steps(model, None)
        return
    own = vars(body).get("forward")
    steps = _Steps(model, body.forward)
    body.forward = steps.body
    try:
        yield steps
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


def _of_batch(batch: Sequence[Labelled], steps: _Steps, chunk: int) -> Tensor:
    ids = nn.utils.rnn.pad_sequence([each.ids.long() for each in batch], batch_first=True)
    sizes = torch.tensor([len(each.ids) for each in batch])
    mask = torch.arange(ids.shape[1]) < sizes[:, None]
    labels = nn.utils.rnn.pad_sequence([each.labels for each in batch], batch_first=True)
    found = torch.zeros(len(batch), dtype=torch.float64)
    # What is said of a token is said at the one before it.
    rows, columns = labels[:, 1:].nonzero(as_tuple=True)
    if len(rows):
        steps.read(ids, mask.long())
    for row, column in zip(rows.split(chunk), columns.split(chunk), strict=True):
        logits = steps.logits(row, column)
        said = ids[row, column + 1].to(logits.device)
        losses = nn.functional.cross_entropy(logits.float(), said, reduction="none")
        found.index_add_(0, row, losses.cpu().double())
    return found


def _chunk(model: Any) -> int:
    """Tokens whose logits are held at once."""
    config = model.config.get_text_config()
    return max(1, _LOGITS // int(config.vocab_size))
