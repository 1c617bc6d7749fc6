"""What a model knows of the stage that is being trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina.checkpoint.record import Base, Lamina, Mode, StageRecord
from lamina.errors import StageError

if TYPE_CHECKING:
    from lamina.model import PeftModel


@dataclass(frozen=True)
class StageContext:
    """The stage that `begin_stage` began.

    Attributes:
        name: of the stage, and of the adapter that trains.
        mode: how it was begun.
        base: the base model.
        parent: the record of the chain below; None for the first stage.
        older: (adapter in the model, its lamina) for all ranks that don't train, oldest first.
        config: the config of the adapter that trains, as the user wrote it.
        continued: the lamina whose ranks it trains on, as the stage before left it; else None.
        checkpoints: how the model's `save_pretrained` and `load_adapter` treat the stage.
    """

    name: str
    mode: Mode
    base: Base
    parent: StageRecord | None
    older: tuple[tuple[str, Lamina], ...]
    config: dict[str, object]
    continued: Lamina | None = None
    checkpoints: Any = None


def context_of(model: PeftModel) -> StageContext:
    """The stage of a model.

    Raises:
        StageError: none was begun on it.
    """
    context = getattr(model, "stage", None)
    if not isinstance(context, StageContext):
        raise StageError(
            "No stage was begun on this model.",
            cure='model = lamina.begin_stage(base, name="...", config=config) for a first stage, '
            "or model.save_pretrained(path) for a plain adapter",
        )
    return context
