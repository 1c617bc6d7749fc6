"""What a method of training is: TRL's trainer and config, and what settings are called there."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lamina.extras import require
from lamina.model import PeftModel
from lamina.training.plan.settings import Settings
from lamina.training.reference import Reference


@dataclass(frozen=True)
class Job:
    """All that a trainer is made from.

    Attributes:
        model: what `begin_stage` returned.
        arguments: the method's TRL config.
        settings: of the stage.
        tokenizer: of the base.
        train: the examples, in the columns that TRL knows for the method.
        held_out: likewise; None without evaluation.
        reference: what a preference is measured against; None where the method has no reference.
        callbacks: of the run.
        optimizer: None takes the one that the arguments name.
        rewards: functions in place of those that the settings name.
    """

    model: PeftModel
    arguments: Any
    settings: Settings
    tokenizer: Any
    train: Any
    held_out: Any = None
    reference: Reference | None = None
    callbacks: tuple[Any, ...] = ()
    optimizer: Any = None
    rewards: tuple[Callable[..., Any], ...] = ()

    def for_trainer(self) -> dict[str, Any]:
        """The keywords that every trainer takes."""
        return {
            "model": self.model,
            "args": self.arguments,
            "train_dataset": self.train,
            "eval_dataset": self.held_out,
            "processing_class": self.tokenizer,
            "callbacks": list(self.callbacks),
            "optimizers": (self.optimizer, None),
        }


@dataclass(frozen=True)
class Method:
    """How a method is trained.

    Attributes:
        name: in plans.
        trl: the names of the config and the trainer in TRL.
        module: where TRL has them.
        head: the model that it trains.
        settings: setting of a plan -> field of the config, beside those of all methods.
        fixed: what the method means, whatever TRL's default is.
        has_reference: whether a reference model takes part.
        make: from a job to the trainer; None hands over what all trainers take.
    """

    name: str
    trl: tuple[str, str]
    module: str = "trl"
    head: Literal["language", "reward"] = "language"
    settings: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    has_reference: bool = False
    make: Callable[[type[Any], Job], Any] | None = None

    def config_class(self) -> type[Any]:
        """The class of its TRL config."""
        return self._of_trl(self.trl[0])

    def trainer(self, job: Job) -> Any:
        """The trainer of a job."""
        kind = self._of_trl(self.trl[1])
        return self.make(kind, job) if self.make else kind(**job.for_trainer())

    def _of_trl(self, name: str) -> type[Any]:
        require("trl", "train")
        # What is experimental there is a matter between Lamina and TRL.
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: type[Any] = getattr(importlib.import_module(self.module), name)
        return found
