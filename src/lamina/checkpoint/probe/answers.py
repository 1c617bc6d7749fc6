"""A model's answers in a few kilobytes: the largest logits, and a digest of all of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lamina.checkpoint.probe.asking import Outputs, ask
from lamina.checkpoint.record import Answers, Probe
from lamina.engine.fold import as_base
from lamina.errors import FoldError, ProbeError

TOP = 4
PROJECTIONS = 3
_DIGITS = 6


def make_probe(model: Any, *, with_base: bool = True) -> Probe | None:
    """What a model answers as it stands, and what its base answers alone; None without tokens.

    The base's answers are left out where the base isn't to be had: adapters were folded in for
    good, or took a part out of it.

    Args:
        model: a model, adapted or not.
        with_base: whether to ask the base too.

    Raises:
        ProbeError: the model can't be asked, or answers NaN.
    """
    chain = ask(model)
    if chain is None:
        return None
    if not chain.is_finite:
        raise ProbeError(
            "The model answers NaN or infinity to the tokens of the probe.",
            cure="look for the weights that are not finite: lamina inspect DIR",
        )
    base = _ask_base(model, chain.tokens) if with_base else None
    return Probe(
        tokens=chain.tokens,
        outputs=chain.values.shape[1],
        dtype=chain.dtype,
        quantization=chain.quantization,
        chain=answers_of(chain),
        base=answers_of(base) if base is not None and base.is_finite else None,
    )


def _ask_base(model: Any, tokens: Sequence[int]) -> Outputs | None:
    state = getattr(model, "adapter_state", None)
    root = model.get_base_model() if state is not None else model
    off: AbstractContextManager[None] = nullcontext() if state is None else as_base(root, state)
    try:
        with off:
            return ask(model, tokens)
    except FoldError:
        return None


def answers_of(outputs: Outputs) -> Answers:
    """The summary that a record holds of what a model answered.

    Of hidden states there is only the digest.
    """
    values = outputs.values.double()
    tops = values.topk(min(TOP, values.shape[1]), dim=1) if outputs.kind == "logits" else None
    return Answers(
        tokens=() if tops is None else tuple(map(tuple, tops.indices.tolist())),
        logits=() if tops is None else rounded(tops.values),
        log_normaliser=() if tops is None else rounded(values.logsumexp(1)[None])[0],
        digest=rounded(digest(values)),
        largest=rounded(values.abs().max()[None, None])[0][0],
    )


def digest(values: torch.Tensor) -> torch.Tensor:
    """Positions x (1 + `PROJECTIONS`): the mean of each row, and its projections `x @ s / sqrt(n)`.

    The signs `s` are fixed. For two rows whose entries differ by independent errors of the standard
    deviation e, a projection differs by a normally distributed error of the same e.
    """
    count = values.shape[1]
    means = values.mean(1, keepdim=True)
    return torch.cat([means, values @ _signs(count) / count**0.5], 1)


@functools.lru_cache(maxsize=4)
def _signs(count: int) -> torch.Tensor:
    """Count x `PROJECTIONS` of +1 and -1, from a hash: the same with every version of torch."""
    columns = []
    for index in range(PROJECTIONS):
        drawn = hashlib.shake_256(f"lamina probe 1 {index}".encode()).digest(count)
        columns.append(torch.frombuffer(bytearray(drawn), dtype=torch.uint8) % 2)
    return torch.stack(columns, 1).double() * 2 - 1


def rounded(values: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    """Rows of numbers in six significant digits."""
    rows: Iterable[list[float]] = values.tolist()
    return tuple(tuple(float(f"{value:.{_DIGITS}g}") for value in row) for row in rows)
