"""Two answers to the same tokens, compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lamina.checkpoint.probe.answers import digest, rounded
from lamina.checkpoint.probe.asking import Outputs
from lamina.checkpoint.probe.tolerance import Tolerance, tolerance_for
from lamina.checkpoint.record import Answers


@dataclass(frozen=True)
class ProbeComparison:
    """How far two answers to the same tokens lie apart.

    Attributes:
        max_difference: the largest difference of two logits. Of a recorded answer the largest
            logits are compared one by one, and all others through the digest, whose projections
            differ as single logits do. Infinite where an answer is NaN, or has another shape.
        max_logit: the largest magnitude of an expected logit, to compare with.
        kl: mean Kullback-Leibler divergence of the actual predictions from the expected ones, over
            all positions, in nats; of a recorded answer a lower bound. None for hidden states.
        top1_agreement: the share of positions with the same first choice; None likewise.
        tolerance: for `max_difference`; None where that isn't judged.
        kl_tolerance: for `kl`, likewise.
        top1_tolerance: the least `top1_agreement`, likewise.
        judged_by: the dtype or the quantisers that the tolerance follows, for people to read.
        passed: whether all that is judged is within its tolerance.
    """

    max_difference: float
    max_logit: float
    kl: float | None
    top1_agreement: float | None
    tolerance: float | None
    kl_tolerance: float | None
    top1_tolerance: float | None
    judged_by: str
    passed: bool


@dataclass(frozen=True)
class Figures:
    """What is measured of two answers; see `ProbeComparison`."""

    max_difference: float
    kl: float | None
    top1: float | None


def compare_answers(
    expected: Outputs | Answers,
    actual: Outputs,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
) -> ProbeComparison:
    """Compare what a model answers with what it should.

    With two `Outputs` all logits are compared. A recorded `Answers` has the largest logits `z`, the
    log normaliser `n` and a digest: with `p = exp(z - n)`, and `q` the actual probabilities of the
    same tokens,

        KL >= sum(p log(p / q)) + (1 - sum p) log((1 - sum p) / (1 - sum q))

    since putting all other tokens into one bucket can only lose divergence; the six digits of a
    record may add a hundredth.

    Args:
        expected: what it should answer.
        actual: what it answers.
        dtype: of the expected answers, where they are recorded; or one that weights were rounded
            to on the way.
        quantization: of the base of the expected answers, where they are recorded.
    """
    figures = (
        _of_all(expected, actual) if isinstance(expected, Outputs) else _of_some(expected, actual)
    )
    dtypes = [actual.dtype, *([dtype] if dtype else [])]
    if isinstance(expected, Outputs):
        dtypes.append(expected.dtype)
        quantization = expected.quantization
    tolerance = tolerance_for(
        expected.largest,
        actual.depth,
        dtypes,
        (quantization, actual.quantization),
        kind=actual.kind,
    )
    return ProbeComparison(
        max_difference=figures.max_difference,
        max_logit=expected.largest,
        kl=figures.kl,
        top1_agreement=figures.top1,
        tolerance=tolerance.difference,
        kl_tolerance=tolerance.kl,
        top1_tolerance=tolerance.top1,
        judged_by=tolerance.reason,
        passed=_within(figures, tolerance),
    )


def _within(figures: Figures, tolerance: Tolerance) -> bool:
    if not math.isfinite(figures.max_difference):
        return False
    judged = [
        tolerance.difference is None or figures.max_difference <= tolerance.difference,
        tolerance.kl is None or (figures.kl is not None and figures.kl <= tolerance.kl),
        tolerance.top1 is None or (figures.top1 is not None and figures.top1 >= tolerance.top1),
    ]
    return all(judged)


_INCOMPARABLE = Figures(math.inf, None, None)


def _of_all(expected: Outputs, actual: Outputs) -> Figures:
    one, other = expected.values, actual.values
    if one.shape != other.shape or not (expected.is_finite and actual.is_finite):
        return _INCOMPARABLE
    figures = compare_logits(one, other)
    return figures if actual.kind == "logits" else Figures(figures.max_difference, None, None)


def compare_logits(expected: torch.Tensor, actual: torch.Tensor) -> Figures:
    """The largest difference, the mean divergence and the share of the same first choices.

    Args:
        expected: positions x outputs.
        actual: likewise.
    """
    one, other = expected.double(), actual.double()
    p, q = F.log_softmax(one, 1), F.log_softmax(other, 1)
    kl = float((p.exp() * (p - q)).sum(1).mean())
    agree = float((one.argmax(1) == other.argmax(1)).double().mean())
    return Figures(float((one - other).abs().max()), max(kl, 0.0), agree)


def _of_some(expected: Answers, actual: Outputs) -> Figures:
    theirs = torch.tensor(expected.digest, dtype=torch.float64)
    ours = torch.tensor(rounded(digest(actual.values.double())), dtype=torch.float64)
    if theirs.shape != ours.shape or not actual.is_finite:
        return _INCOMPARABLE
    difference = float((theirs - ours).abs().max())
    if not expected.tokens:
        return Figures(difference, None, None)
    at = logits_at(expected, actual)
    if at is None:
        return _INCOMPARABLE
    logits = torch.tensor(expected.logits, dtype=torch.float64)
    difference = max(difference, float((logits - at).abs().max()))
    first = torch.tensor([row[0] for row in expected.tokens])
    agree = float((actual.values.argmax(1) == first).double().mean())
    return Figures(difference, _kl_of_some(expected, logits, at, actual), agree)


def logits_at(expected: Answers, actual: Outputs) -> torch.Tensor | None:
    """Positions x tokens: the actual logits of the recorded tokens, in as many digits."""
    ids = torch.tensor(expected.tokens)
    values = actual.values.double()
    if ids.shape[0] != values.shape[0] or int(ids.max()) >= values.shape[1] or int(ids.min()) < 0:
        return None
    return torch.tensor(rounded(values.gather(1, ids)), dtype=torch.float64)


def _kl_of_some(
    expected: Answers, logits: torch.Tensor, at: torch.Tensor, actual: Outputs
) -> float:
    normalisers = torch.tensor(expected.log_normaliser, dtype=torch.float64)[:, None]
    ours = torch.tensor(rounded(actual.values.double().logsumexp(1)[None])[0], dtype=torch.float64)[
        :, None
    ]
    p, q = _with_rest(logits - normalisers), _with_rest(at - ours)
    return max(float((p * (p / q).log()).sum(1).mean()), 0.0)


def _with_rest(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities of some tokens and of all others together; none is zero."""
    least = 1e-9
    known = log_probabilities.exp().clamp(min=least)
    rest = (1 - known.sum(1, keepdim=True)).clamp(min=least)
    whole = torch.cat([known, rest], 1)
    return whole / whole.sum(1, keepdim=True)
