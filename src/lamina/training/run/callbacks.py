"""What a run adds to a trainer: checks around the first step, the log, the checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

import lamina
from lamina.errors import PreflightError
from lamina.model import PeftModel
from lamina.stages.context import context_of
from lamina.training.run.checkpoints import seal
from lamina.training.run.interrupts import Stop
from lamina.training.run.log import Log
from lamina.training.run.told import Told

# In fp16 the first steps overflow until the loss is scaled as it should be.
_PATIENCE_FP16 = 10


class Checks(TrainerCallback):  # type: ignore[misc]
    """Before the first step the right thing is trainable; after it, all of it has a gradient."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._looked = 0
        self._done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Nothing but the stage's adapter trains, and the optimizer has it."""
        check_trainable(self._model, given.get("optimizer"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Every factor got a finite gradient."""
        if self._done:
            return
        self._looked += 1
        try:
            lamina.check_gradients(self._model)
        except PreflightError:
            if not args.fp16 or self._looked >= _PATIENCE_FP16:
                raise
        else:
            self._done = True


def check_trainable(model: PeftModel, optimizer: Any) -> None:
    """The stage's adapter is what trains, nothing else is, and the optimizer has all of it.

    Raises:
        PreflightError: with all that is wrong.
    """
    lamina.preflight(model)
    name = context_of(model).name
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    biased = model.peft_config[name].bias != "none"
    strange = [
        key
        for key in trained
        if f".{name}." not in f"{key}." and not (biased and key.endswith(".bias"))
    ]
    faults = [f"it is trainable, and no part of {name!r}: {key}" for key in strange]
    groups = getattr(optimizer, "param_groups", None)
    if groups is not None:
        held = {id(p) for group in groups for p in group["params"]}
        missing = [key for key, p in trained.items() if id(p) not in held]
        faults += [f"the optimizer has no {key}" for key in missing]
        faults += ["the optimizer is empty"] if not held else []
    if faults:
        raise PreflightError(f"Stage {name!r} would not train what it should.", faults=faults)


class Following(TrainerCallback):  # type: ignore[misc]
    """Writes the log, seals checkpoints, tells of steps, and stops when asked to."""

    def __init__(self, name: str, stage_hash: str, log: Log, told: Told, stop: Stop) -> None:
        self._name, self._hash = name, stage_hash
        self._log, self._told, self._stop = log, told, stop
        self._began = time.monotonic()
        self.interrupted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Where the steps begin."""
        self._began = time.monotonic()
        self._told.training_begins(self._name, state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> Any:
        """Stop, with a checkpoint, if somebody asked for it."""
        self._told.step(self._name, state.global_step, state.max_steps)
        if self._stop.asked and state.global_step < state.max_steps:
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """A line of the log."""
        if self.interrupted and "train_runtime" in (logs or {}):
            # Training ends here for the trainer alone.
            return
        # The mean over all steps, which the end brings, leaves out those before a resumption.
        told = {key: value for key, value in (logs or {}).items() if key != "train_loss"}
        values = {
            "stage": self._name,
            "step": state.global_step,
            "steps": state.max_steps,
            **told,
            "seconds": round(time.monotonic() - self._began, 3),
            "time": round(time.time(), 3),
        }
        values["memory"] = _memory()
        self._log.write(values)
        self._told.logged(self._name, state.global_step, values)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The checkpoint is complete."""
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and checkpoint.is_dir():
            seal(checkpoint, self._hash)


def _memory() -> int:
    """Bytes: on a GPU the most that was allocated, else what the process has now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)
