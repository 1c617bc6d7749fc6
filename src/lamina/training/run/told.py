"""What a run tells of itself while it goes on; whoever shows it overrides what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    Attributes:
        name: of the stage.
        path: its directory.
        status: "trained", "resumed" (from a checkpoint), "kept" (it was finished before) or
            "interrupted".
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

    def stage_ends(self, result: StageResult) -> None:
        """A stage is done, or was done before."""
