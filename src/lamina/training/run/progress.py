"""How far a checkpoint is, as its trainer noted it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.storage.whole import write_whole
from lamina.training.run.checkpoints import seal

_FILE = "trainer_state.json"
_STOPPING, _TALLY = "EarlyStoppingCallback", "Tally"


def relocate(checkpoint: Path, stage_hash: str) -> None:
    """Let a checkpoint of a run that was moved find the best one where it lies now.

    A trainer that can't find the best checkpoint goes without it.
    """
    file = checkpoint / _FILE
    told = json.loads(file.read_text())
    best = told.get("best_model_checkpoint")
    here = checkpoint.parent / Path(best).name if best else None
    if here is None or str(here) == best or not here.is_dir():
        return
    write_whole(file, json.dumps({**told, "best_model_checkpoint": str(here)}, indent=2) + "\n")
    seal(checkpoint, stage_hash)


@dataclass(frozen=True)
class Progress:
    """What a checkpoint says of the training that it is of.

    Attributes:
        step: optimizer steps done.
        steps: of all.
        history: the entries of the log.
        best: the checkpoint with the best evaluation, where one is looked for.
        waited: evaluations without a better loss.
        tally: what the trainer had counted since it last told.
    """

    step: int = 0
    steps: int = 0
    history: tuple[dict[str, Any], ...] = ()
    best: Path | None = None
    waited: int = 0
    tally: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Path | None) -> Progress:
        """Of a whole checkpoint; nothing of none."""
        if checkpoint is None:
            return cls()
        told = json.loads((checkpoint / _FILE).read_text())
        best = told.get("best_model_checkpoint")
        return cls(
            step=told["global_step"],
            steps=told["max_steps"],
            history=tuple(told["log_history"]),
            # The run may have been moved; its checkpoints lie beside one another.
            best=checkpoint.parent / Path(best).name if best else None,
            waited=_kept(told, _STOPPING).get("early_stopping_patience_counter", 0),
            tally=_kept(told, _TALLY),
        )

    def is_done(self, patience: int | None) -> bool:
        """Whether no step is left: a trainer that goes on from here would make one too many."""
        return bool(self.step) and (
            self.step >= self.steps or (patience is not None and self.waited >= patience)
        )


def _kept(told: dict[str, Any], callback: str) -> dict[str, Any]:
    """What a callback keeps in checkpoints."""
    found = told.get("stateful_callbacks", {}).get(callback, {})
    found = found[-1] if isinstance(found, list) else found
    kept: dict[str, Any] = found.get("attributes", {})
    return kept
