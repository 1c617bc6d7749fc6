"""The count of tokens that a trainer tells of: it goes on where a checkpoint left off."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

# Where TRL's trainers count; what has none of it is not changed.
_COUNT = "_total_train_tokens"


class Tokens(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the count of TRL's trainers, which begin at 0 again, in checkpoints.

    Args:
        counted: by the checkpoint that is gone on from.
    """

    def __init__(self, counted: int) -> None:
        self._counted = counted
        self._trainer: Any = None

    def follow(self, trainer: Any) -> None:
        """Let a trainer go on from the count."""
        self._trainer = trainer
        if hasattr(trainer, _COUNT):
            setattr(trainer, _COUNT, self._counted)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        counted = getattr(self._trainer, _COUNT, 0)
        return {"args": {}, "attributes": {"counted": int(counted)}}
