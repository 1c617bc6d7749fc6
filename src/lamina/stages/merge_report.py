"""What a merge says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lamina.checkpoint.probe import ProbeComparison
from lamina.errors import CheckpointError

Verification = Literal["auto", "model", "samples", "none"]


class NotAsExpectedError(CheckpointError):
    """A merged model isn't what it should be."""


@dataclass(frozen=True)
class Verified:
    """How the result was looked at before it was published.

    Attributes:
        how: "model": it was opened and asked; "samples": entries were read back and computed again
            in fp64, by other code.
        against: what it was compared with, for people to read.
        max_difference: of two logits; of "samples", of an entry and what it should be, in units of
            the last place of its dtype and beyond what sums in fp32 explain: rounding makes 0.5.
        max_logit: the largest magnitude of an expected logit; None for "samples".
        kl: mean divergence of the predictions, in nats; None where there are none.
        top1_agreement: the share of positions with the same first choice; likewise.
        tolerance: for `max_difference`; None where it isn't judged.
        entries: how many entries were looked at; None for "model".
        unseen: changed tensors that no entry was looked at of.
    """

    how: Literal["model", "samples"]
    against: str
    max_difference: float
    max_logit: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    tolerance: float | None = None
    entries: int | None = None
    unseen: int = 0

    @classmethod
    def asked(cls, found: ProbeComparison, against: str) -> Verified:
        """Of two answers."""
        return cls(
            "model",
            against,
            max_difference=found.max_difference,
            max_logit=found.max_logit,
            kl=found.kl,
            top1_agreement=found.top1_agreement,
            tolerance=found.tolerance,
        )


@dataclass(frozen=True)
class MergeReport:
    """What was saved.

    Attributes:
        path: the directory.
        model_class: of the saved model.
        dtype: of its weights.
        parameters: entries of its weights.
        files: name -> bytes.
        tokenizer: where its tokenizer came from; None without one.
        streamed: whether it was merged tensor by tensor, without building the model.
        why_in_memory: why it wasn't; None if it was, or if that was asked for.
        changed: how many tensors of the files changed; None if it wasn't streamed.
        kept_files: how many files a merge that was killed had finished.
        seconds: what writing took, without looking at the result.
        verified: how it was looked at; None if it wasn't.
        why_not_verified: why it wasn't; None if it was, or if that was asked for.
    """

    path: str
    model_class: str
    dtype: str
    parameters: int
    files: dict[str, int]
    tokenizer: str | None
    streamed: bool
    why_in_memory: str | None = None
    changed: int | None = None
    kept_files: int = 0
    seconds: float = 0.0
    verified: Verified | None = None
    why_not_verified: str | None = None

    @property
    def max_logit_difference(self) -> float | None:
        """The largest difference of two logits, where the result was asked."""
        asked = self.verified is not None and self.verified.how == "model"
        return self.verified.max_difference if self.verified and asked else None

    @property
    def max_logit(self) -> float | None:
        """The largest magnitude among them, to compare with."""
        return self.verified.max_logit if self.verified else None
