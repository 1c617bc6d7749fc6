"""How far a run is, from its files: nothing of it has to be running."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.errors import RunError
from lamina.training.evaluate.matrix import Matrix, matrix_of
from lamina.training.evaluate.scores import Evaluation
from lamina.training.run.lock import is_locked
from lamina.training.run.log import read_log
from lamina.training.run.state import FILE, RunState


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is.

    Attributes:
        name: of the stage.
        status: "waiting", "running", "cut off" (killed; the same command goes on), "interrupted",
            "failed", "finished", "outdated" (what it was built on isn't what it is now), or what a
            gate made of a finished stage: "refused", "rolled back".
        step: the last step in its log.
        steps: of all; None before the first line of the log.
        loss: the last one in its log.
        seconds: that it took, runs that were cut off left out.
        why: what stopped it, or which bounds of its gate it broke.
        metrics: as in its record.
    """

    name: str
    status: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    seconds: float = 0.0
    why: str = ""
    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        directory: its `output_dir`.
        running: whether a process works on it now.
        stages: in their order.
    """

    directory: str
    running: bool
    stages: tuple[StageStatus, ...]


def status_of(directory: str | Path) -> RunStatus:
    """Look at a run.

    Raises:
        RunError: there is none.
    """
    folder = Path(directory).expanduser()
    if not (folder / FILE).is_file():
        raise RunError(f"There is no run in {folder}.", cure="lamina run plan.yaml begins one")
    running = is_locked(folder)
    state = RunState.read(folder)
    return RunStatus(
        str(folder), running, tuple(_stage(folder, state, name, running) for name in state.order)
    )


def matrix_in(directory: str | Path) -> Matrix:
    """Stages by evals, of the stages that the newest one that counts is made of.

    Raises:
        RunError: the files of the run are broken.
    """
    folder = Path(directory).expanduser()
    return matrix_of(Evaluation.read(folder), RunState.read(folder).chain)


def log_file(directory: str | Path, stage: str) -> Path:
    """Where the log of a stage is."""
    return Path(directory).expanduser() / "logs" / f"{stage}.jsonl"


def _stage(folder: Path, state: RunState, name: str, running: bool) -> StageStatus:
    known = state.stages.get(name)
    if known is None:
        return StageStatus(name, "waiting")
    lines = list(read_log(log_file(folder, name)))
    last = lines[-1] if lines else {}
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    standing = "outdated" if name in state.outdated else known.standing
    cut_off = known.status == "running" and not running
    steps: Any = last.get("steps")
    return StageStatus(
        name=name,
        status="cut off" if cut_off else standing,
        step=int(last.get("step", 0)),
        steps=None if steps is None else int(steps),
        loss=losses[-1] if losses else None,
        seconds=known.seconds,
        why=known.why or "; ".join(known.gate.faults if known.gate else ()),
        metrics=known.metrics or None,
    )
