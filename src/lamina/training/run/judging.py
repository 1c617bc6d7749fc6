"""What a run measures of its base and stages, and keeps in `evaluation.json`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import lamina
from lamina.training.evaluate.gate import verdict
from lamina.training.evaluate.judge import Judge, Subject
from lamina.training.evaluate.matrix import BASE
from lamina.training.evaluate.scores import Evaluation, Judged, Score
from lamina.training.plan import Plan
from lamina.training.plan.settings import Gate
from lamina.training.run.base import load_base
from lamina.training.run.identity import base_identity, digest
from lamina.training.run.interrupts import Stop
from lamina.training.run.state import Judgement
from lamina.training.run.told import Told


@dataclass(frozen=True)
class Saved:
    """A stage that a run has saved.

    Attributes:
        name: of the stage.
        identity: what its hash and its tensors come to.
        built_on: the stage that it was begun on; None is the base.
        head: what it answers with.
    """

    name: str
    identity: str
    built_on: str | None
    head: Literal["language", "reward"]


class Judging:
    """Measures what isn't known yet: every stage as it was saved, opened again and verified.

    Args:
        plan: the plan.
        tokenizer: of it.
        root: the folder of the plan's file.
        told: hears of scores.
        stop: is looked at between evals.
        resume: go on from what is known; else all is measured anew.

    Raises:
        LaminaError: the data of evals can't be used; with all that is wrong.
    """

    def __init__(
        self, plan: Plan, tokenizer: Any, root: Path, told: Told, stop: Stop, *, resume: bool
    ) -> None:
        self._plan, self._tokenizer = plan, tokenizer
        self._told, self._stop = told, stop
        self._directory = Path(plan.output_dir)
        self._judge = Judge.of(plan, tokenizer=tokenizer, root=root)
        self._base = base_identity(plan, getattr(tokenizer, "chat_template", None))
        before = Evaluation.read(self._directory) if resume else Evaluation()
        names = [stage.name for stage in plan.stages]
        self._evaluation = Evaluation(
            base=before.base,
            stages={name: each for name, each in before.stages.items() if name in names},
            evals=tuple(plan.evals),
            learnt_in={name: each.stage for name, each in plan.evals.items() if each.stage},
        )

    def base(self) -> bool:
        """Measure the base, if there is anything to be measured; whether all of it is known now."""
        if not self._judge.measures:
            return True
        return self._look(None, Subject(self._base), lambda: load_base(self._plan, "language"))

    def stage(self, saved: Saved) -> bool:
        """Measure a stage; whether all of it is known now.

        Raises:
            VerificationError: opened again, it doesn't answer as when it was saved.
        """
        directory = self._directory / saved.name
        before = None if saved.built_on is None else self._directory / saved.built_on
        identity = digest({"base": self._base, "stage": saved.identity})
        subject = Subject(identity, directory, before, saved.head)

        def opened() -> Any:
            base = load_base(self._plan, saved.head)
            return lamina.load(directory, base, tokenizer=self._tokenizer, verify=True)

        return self._look(saved.name, subject, opened)

    def judgement(self, gate: Gate, name: str, built_on: str | None) -> Judgement:
        """What a stage's gate says of it."""
        after = self._evaluation.of(name)
        assert after is not None
        found = verdict(gate, self._evaluation.of(built_on), after)
        return Judgement(found.passed, gate.on_failure, found.faults, found.told)

    def _look(self, stage: str | None, subject: Subject, opened: Callable[[], Any]) -> bool:
        known = self._evaluation.of(stage)
        missing = self._judge.missing(subject, known)
        if missing is None:
            self._keep(stage, self._judge.kept(subject, known))
            return True
        name = stage or BASE
        self._told.judging_begins(name, missing)
        judging = self._judge.judge(opened().eval(), subject, known, self._heard(name))
        for judged in judging:
            self._keep(stage, judged)
            if self._stop.asked:
                break
        del judging
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._judge.missing(subject, self._evaluation.of(stage)) is None

    def _heard(self, name: str) -> Callable[[str, Score | None], None]:
        return lambda eval_name, score: self._told.measured(name, eval_name, score)

    def _keep(self, stage: str | None, judged: Judged) -> None:
        self._evaluation = self._evaluation.having(stage, judged)
        self._evaluation.write(self._directory)
