"""What a verification found: what was compared, what failed, and why, likeliest cause first."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lamina.checkpoint.probe import Effect, ProbeComparison
from lamina.errors import VerificationError

Kind = Literal[
    "incomplete file",
    "damaged record",
    "changed config",
    "not finite",
    "another base",
    "base already merged",
    "adapter not applied",
    "adapter scaled",
    "other stages",
    "changed weights",
    "another tokenizer",
    "another chat template",
    "quantisation",
    "dtype",
    "not loadable",
    "unknown",
]
Verdict = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        verdict: "passed", "failed" or "not checked".
        detail: what was found, or why it wasn't checked.
    """

    name: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class Cause:
    """Why a verification failed, as far as it can be told.

    Attributes:
        kind: which of the known causes it is.
        sentence: it, in words.
        cure: what mends it.
    """

    kind: Kind
    sentence: str
    cure: str


@dataclass(frozen=True)
class VerifyReport:
    """What was verified of an adapter.

    Attributes:
        path: the adapter.
        stages: of its chain, oldest first.
        base: what it was verified on.
        checks: all that was looked at.
        answers: base and adapter beside what is on record; None if that couldn't be replayed.
        base_answers: the base alone, likewise.
        effect: how much of the adapter's recorded effect is there.
        causes: why it failed, likeliest first; empty where it didn't.
        notes: what is different, and no fault.
        proved: whether recorded answers were replayed, and came out.
        passed: whether nothing failed; without `proved`, nothing was seen that is wrong.
    """

    path: str
    stages: tuple[str, ...]
    base: str | None
    checks: tuple[Check, ...]
    answers: ProbeComparison | None = None
    base_answers: ProbeComparison | None = None
    effect: Effect | None = None
    causes: tuple[Cause, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(check.verdict == "failed" for check in self.checks)

    @property
    def proved(self) -> bool:
        """Whether recorded answers were replayed, and nothing failed."""
        return self.passed and self.answers is not None

    def to_dict(self) -> dict[str, Any]:
        """It, as JSON can hold it: what is infinite is None."""
        values = dataclasses.asdict(self)
        for name in ("answers", "base_answers", "effect"):
            found = values[name] or {}
            infinite = [
                k for k, v in found.items() if isinstance(v, float) and not math.isfinite(v)
            ]
            found.update(dict.fromkeys(infinite))
        return {**values, "passed": self.passed, "proved": self.proved}

    def raise_if_failed(self) -> None:
        """Turn a failure into an error.

        Raises:
            VerificationError: it failed.
        """
        if self.passed:
            return
        likeliest = self.causes[0]
        raise VerificationError(
            f"{self.path} is not, or doesn't answer, what was saved: {likeliest.sentence}",
            faults=[f"{c.name}: {c.detail}" for c in self.checks if c.verdict == "failed"],
            cure=likeliest.cure,
        )
