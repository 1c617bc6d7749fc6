"""All that base and stages are judged by, measured where it isn't known yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lamina.training.evaluate.answers import answers, answers_hash
from lamina.training.evaluate.drift import drift_of
from lamina.training.evaluate.measuring import measure
from lamina.training.evaluate.prepared import Prepared, prepare_evals
from lamina.training.evaluate.scores import Judged, Measured, Score
from lamina.training.plan import Plan

_BATCH = 8


@dataclass(frozen=True)
class Subject:
    """What is judged: the base, or what a stage saved.

    Attributes:
        weights: the digest of what it is.
        stage: its directory; None is the base.
        before: that of the stage that it was built on; None is the base.
        head: what it answers with.
    """

    weights: str | None
    stage: Path | None = None
    before: Path | None = None
    head: Literal["language", "reward"] = "language"


@dataclass(frozen=True)
class Judge:
    """Evals and prompts of a plan, ready to be put to its base and stages.

    Attributes:
        plan: the plan.
        tokenizer: of it.
        evals: with their data.
    """

    plan: Plan
    tokenizer: Any
    evals: Mapping[str, Prepared] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, *, tokenizer: Any, root: Path) -> Judge:
        """Read the data of all evals.

        Raises:
            LaminaError: with all that is wrong with any of them.
        """
        return cls(plan, tokenizer, prepare_evals(plan, tokenizer=tokenizer, root=root))

    @property
    def measures(self) -> bool:
        """Whether there is anything to be measured."""
        return bool(self.evals or self.plan.prompts)

    def missing(self, subject: Subject, known: Judged | None) -> list[str] | None:
        """The evals that have to be measured; None if nothing of `subject` is left to be known."""
        there = self.kept(subject, known)
        names = [name for name in self.evals if name not in there.scores]
        whole = not names and self._has_answers(subject, there) and self._has_drift(subject, there)
        return None if whole else names

    def kept(self, subject: Subject, known: Judged | None) -> Judged:
        """What of `known` still holds."""
        if known is None or known.weights != subject.weights or subject.weights is None:
            return Judged(weights=subject.weights)
        scores = {
            name: each
            for name, each in known.scores.items()
            if name in self.evals and each.hash == self.evals[name].hash
        }
        answered = known.answers_hash == self._answers_hash()
        return replace(
            known,
            scores=scores,
            answers=known.answers if answered else (),
            answers_hash=known.answers_hash if answered else "",
        )

    def judge(
        self,
        model: Any,
        subject: Subject,
        known: Judged | None,
        heard: Callable[[str, Score | None], None],
    ) -> Iterator[Judged]:
        """Measure what isn't known, one thing after the other.

        Args:
            model: the base, or the stage's chain over it; it is left as it is.
            subject: what it is.
            known: what was measured before.
            heard: is told of every eval and its score.

        Yields:
            All that is known after each of them; between two of them one may stop.
        """
        found = self.kept(subject, known)
        began = time.monotonic() - found.seconds
        for name in self.missing(subject, known) or ():
            measured = self._measured(name, model, subject)
            heard(name, measured.score)
            scores = {**found.scores, name: measured}
            in_order = {each: scores[each] for each in self.evals if each in scores}
            found = replace(found, scores=in_order, seconds=_since(began))
            yield found
        if not self._has_answers(subject, found):
            given = answers(self.plan.prompts, model, self.tokenizer, batch_size=self._batch_size)
            found = replace(
                found, answers=given, answers_hash=self._answers_hash(), seconds=_since(began)
            )
            yield found
        if not self._has_drift(subject, found):
            assert subject.stage is not None
            drift = drift_of(subject.stage, subject.before, model)
            yield replace(found, drift=drift, seconds=_since(began))

    def _measured(self, name: str, model: Any, subject: Subject) -> Measured:
        began = time.monotonic()
        prepared = self.evals[name]
        with torch.no_grad():
            score = measure(
                prepared, model, self.tokenizer, head=subject.head, batch_size=self._batch_size
            )
        return Measured(prepared.hash, score, round(time.monotonic() - began, 3))

    def _has_drift(self, subject: Subject, found: Judged) -> bool:
        return subject.stage is None or found.drift is not None

    def _has_answers(self, subject: Subject, found: Judged) -> bool:
        if subject.head == "reward" or not self.plan.prompts:
            return True
        return found.answers_hash == self._answers_hash()

    def _answers_hash(self) -> str:
        return answers_hash(self.plan.prompts, self.tokenizer) if self.plan.prompts else ""

    @property
    def _batch_size(self) -> int:
        return self.plan.defaults.per_device_eval_batch_size or _BATCH


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
