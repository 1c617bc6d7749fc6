"""What a trainer has counted since it last told: it goes on where a checkpoint left off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

# Where trainers count: the loss since the last line of the log, the step of that line, and what
# those of TRL add. A trainer that has none of one begins it at nothing, as it would by itself.
_LOSS, _LOGGED = "_tr_loss", "_globalstep_last_logged"
_TOKENS, _METRICS = "_total_train_tokens", "_metrics"


class Tally(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps in checkpoints what trainers begin anew, so that the log goes on as if undisturbed.

    Args:
        kept: what the checkpoint that is gone on from has kept; nothing at the beginning.
    """

    def __init__(self, kept: Mapping[str, Any]) -> None:
        self._kept = kept
        self._trainer: Any = None

    def follow(self, trainer: Any) -> None:
        """Count for a trainer."""
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **given: Any) -> None:
        """Go on with the counts."""
        kept, trainer = self._kept, self._trainer
        if not kept:
            return
        setattr(trainer, _LOGGED, kept["logged"])
        getattr(trainer, _LOSS).add_(kept["loss"])
        if hasattr(trainer, _TOKENS):
            setattr(trainer, _TOKENS, kept["tokens"])
        for name, values in kept["metrics"].items():
            getattr(trainer, _METRICS)["train"][name] = list(values)

    def on_log(self, *args: Any, logs: Mapping[str, Any] | None = None, **given: Any) -> None:
        """Count what is next from nothing: NaN less itself, as trainers reset it, is NaN still."""
        loss = getattr(self._trainer, _LOSS)
        if "loss" in (logs or {}) and not loss.isfinite():
            loss.zero_()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        trainer = self._trainer
        metrics = getattr(trainer, _METRICS, {}).get("train", {})
        kept = {
            "logged": getattr(trainer, _LOGGED, 0),
            "loss": float(getattr(trainer, _LOSS, 0.0)),
            "tokens": int(getattr(trainer, _TOKENS, 0)),
            "metrics": {name: [float(each) for each in values] for name, values in metrics.items()},
        }
        return {"args": {}, "attributes": kept}
