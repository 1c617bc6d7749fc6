"""What is talked to: the directory of a stage, or that of a run with all its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamina.config import PeftConfig
from lamina.errors import RunError
from lamina.model import PeftModel
from lamina.stages.viewed import Opening, View, check_known, open_view
from lamina.training.run.state import FILE, RunState


@dataclass(frozen=True)
class Subject:
    """A directory that was asked for.

    Attributes:
        path: it.
        directories: of a run, stage -> where it was saved, in the plan's order; else nothing.
        chain: of a run, the stages that its end is made of, oldest first.
        rolled_back: of a run, the stages that its gates refused.
    """

    path: str
    directories: dict[str, Path]
    chain: tuple[str, ...]
    rolled_back: tuple[str, ...]

    @property
    def is_run(self) -> bool:
        """Whether it is that of a run."""
        return bool(self.directories)

    def view(self, stage: str | None, how: Opening) -> View:
        """Open it, with a stage shown; None is the end of the chain.

        Raises:
            StageError, CheckpointError, VerificationError: as `lamina.stages.viewed.open_view`.
        """
        if not self.is_run:
            return open_view(self.path, stage, how=how)
        if stage is not None:
            check_known(stage, tuple(self.directories))
        shown = stage or self.chain[-1]
        path = self.directories[shown]
        return open_view(path, shown, directories=self.directories, how=how)

    def writing(self, stages: Sequence[str]) -> tuple[str, ...]:
        """Those of a run's stages that are language models; of all else every one."""
        return tuple(name for name in stages if not self.is_run or _writes(self.directories[name]))


def subject_of(path: str | Path) -> Subject:
    """Look at a directory, or a hub id.

    Raises:
        RunError: it is that of a run of which no stage counts yet.
    """
    folder = Path(path).expanduser()
    if not (folder / FILE).is_file():
        return Subject(str(path), {}, (), ())
    state = RunState.read(folder)
    known = [(name, state.stages[name]) for name in state.order if name in state.stages]
    finished = {name: folder / name for name, each in known if each.status == "finished"}
    if not state.chain:
        raise RunError(
            f"No stage of the run in {folder} counts yet.",
            faults=[f"{name}: {each.standing}" for name, each in known],
            cure="lamina run plan.yaml goes on with it",
        )
    refused = tuple(name for name, each in known if name in finished and not each.counts)
    return Subject(str(folder), finished, state.chain, refused)


def _writes(directory: Path) -> bool:
    config = PeftConfig.from_pretrained(str(directory))
    return not PeftModel.for_task(config.task_type).task_heads
