"""What a run tells of itself while it goes on; whoever shows it overrides what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.training.evaluate.scores import Score
from lamina.training.run.state import Judgement


@dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    Attributes:
        name: of the stage.
        path: its directory.
        status: "trained", "resumed" (from a checkpoint), "kept" (it was finished before),
            "interrupted", or "rolled back" (its gate refused it, and the run went on without it).
        why: what made it run again, or where it went on.
        steps: optimizer steps in all.
        metrics: as in its record.
        seconds: that this run spent on it.
    """

    name: str
    path: str
    status: str
    why: str = ""
    steps: int = 0
    metrics: Mapping[str, float] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        directory: its `output_dir`.
        path: the directory of the last stage that counts; "" if every one was rolled back.
        stages: what became of each, as far as the run came.
        interrupted: whether it was stopped; the same call goes on.
        report: the file of the report; "" if none was written.
    """

    directory: str
    path: str
    stages: tuple[StageResult, ...]
    interrupted: bool = False
    report: str = ""


class Told:
    """Hears of every event of a run, and does nothing."""

    def begins(self, stages: Sequence[str], directory: str) -> None:
        """A run over these stages."""

    def stage_begins(self, name: str, number: int, why: str) -> None:
        """A stage is prepared; `why` it is, where it has been run before."""

    def training_begins(self, name: str, step: int, steps: int) -> None:
        """Optimizer steps begin at `step` of `steps`."""

    def step(self, name: str, step: int, steps: int) -> None:
        """A step is done."""

    def logged(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """A line of the log."""

    def judging_begins(self, name: str, missing: Sequence[str]) -> None:
        """The base, or a stage, is measured on these evals."""

    def measured(self, name: str, eval_name: str, score: Score | None) -> None:
        """What one of them says; None if it can't be measured on this model."""

    def gate(self, name: str, judgement: Judgement) -> None:
        """What a stage's gate says of it."""

    def retried(self, name: str, learning_rate: float) -> None:
        """A stage that its gate refused is made again at another learning rate."""

    def stage_ends(self, result: StageResult) -> None:
        """A stage is done, or was done before."""
