"""One stage: from its parent on disk to its own directory."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, set_seed

import lamina
from lamina.errors import CheckpointError, DivergedError, RunError
from lamina.model import PeftModel
from lamina.training.data import StageData
from lamina.training.plan import Plan, StagePlan, adapter_config
from lamina.training.plan.settings import Settings
from lamina.training.reference import Reference, reference_of
from lamina.training.run import failures
from lamina.training.run.base import load_base, precision_of
from lamina.training.run.callbacks import Checks, Following, check_trainable
from lamina.training.run.checkpoints import newest, step_of
from lamina.training.run.interrupts import Stop
from lamina.training.run.log import Log
from lamina.training.run.progress import Progress, relocate
from lamina.training.run.tally import Tally
from lamina.training.run.told import Told
from lamina.training.trainers import METHODS, Job
from lamina.training.trainers.arguments import arguments_for

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


@dataclass(frozen=True)
class Places:
    """Where a stage of a run lies.

    Attributes:
        root: the run's `output_dir`.
        name: of the stage.
    """

    root: Path
    name: str

    @property
    def stage(self) -> Path:
        """The finished stage."""
        return self.root / self.name

    @property
    def work(self) -> Path:
        """Its checkpoints, while it is trained."""
        return self.root / f"{self.name}.work"

    @property
    def log(self) -> Path:
        """Its log, a line of JSON per entry."""
        return self.root / "logs" / f"{self.name}.jsonl"


@dataclass(frozen=True)
class Task:
    """A stage that is to be run.

    Attributes:
        plan: the plan.
        stage: the stage.
        places: where it lies.
        hash: of what it depends on.
        parent: the directory of the stage before.
        data: what it is trained on.
        tokenizer: of the base.
        resume: whether checkpoints are gone on from.
    """

    plan: Plan
    stage: StagePlan
    places: Places
    hash: str
    parent: Path | None
    data: StageData
    tokenizer: Any
    resume: bool = True

    @property
    def settings(self) -> Settings:
        """What it is run with."""
        return self.plan.settings_of(self.stage)


@dataclass(frozen=True)
class Outcome:
    """What a stage came to.

    Attributes:
        interrupted: whether it was stopped; then it isn't saved but can be gone on with.
        steps: optimizer steps in all.
        began: the step that it went on from.
        metrics: of its end.
        weights: the digest of what was saved.
    """

    interrupted: bool
    steps: int
    began: int
    metrics: dict[str, float]
    weights: str | None = None


def run_stage(task: Task, told: Told, stop: Stop) -> Outcome:
    """Train a stage, from its last checkpoint if there is one, and save it.

    Raises:
        LaminaError: it can't be begun, would train the wrong thing, or failed in training.
    """
    logs = task.places.root / "logs"
    try:
        with _tensorboard(logs / task.stage.name), failures.told(task.stage.name, logs):
            return _run(task, told, stop)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run(task: Task, told: Told, stop: Stop) -> Outcome:
    checkpoint = newest(task.places.work, task.hash) if task.resume else None
    began = step_of(checkpoint) if checkpoint else 0
    if checkpoint is not None:
        relocate(checkpoint, task.hash)
    progress = Progress.of(checkpoint)
    model = _begin(task)
    if checkpoint is not None and progress.is_done(task.settings.early_stopping_patience):
        return _ended(task, model, progress, checkpoint)
    following = Following(task.stage.name, task.hash, Log(task.places.log, began), told, stop)
    trainer = _trainer(task, model, following, progress)
    check_trainable(model, trainer.optimizer)
    with _divergence_told(task, model):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    steps = trainer.state.global_step
    metrics = _metrics(trainer.state.log_history)
    if following.interrupted:
        return Outcome(True, steps, began, metrics)
    if not steps:
        raise RunError(
            f"Stage {task.stage.name!r} made no step: its examples fill none.",
            cure="more data, a smaller per_device_train_batch_size, or no packing",
        )
    with _divergence_told(task, model):
        return Outcome(False, steps, began, metrics, _save(task, model, metrics))


@contextmanager
def _divergence_told(task: Task, model: PeftModel) -> Iterator[None]:
    """No checkpoint holds what is no number: where one is refused for that, training diverged."""
    try:
        yield
    except CheckpointError as error:
        trained = [each for each in model.parameters() if each.requires_grad]
        broken = sum(not bool(each.isfinite().all()) for each in trained)
        if not broken:
            raise
        raise DivergedError(
            f"The training of stage {task.stage.name!r} diverged: {broken} of the {len(trained)} "
            "tensors that it trains hold NaN or Inf.",
            cure="a lower learning_rate, or max_grad_norm; a gate with on_failure: retry lowers "
            "the rate by itself",
        ) from error


def _ended(task: Task, model: PeftModel, progress: Progress, checkpoint: Path) -> Outcome:
    """The end of a stage that was cut off between its last step and its being saved."""
    model.load_adapter(progress.best or checkpoint, task.stage.name, is_trainable=True)
    metrics = _metrics(progress.history)
    weights = _save(task, model, metrics)
    return Outcome(False, progress.step, progress.step, metrics, weights)


def _begin(task: Task) -> PeftModel:
    settings = task.settings
    set_seed(settings.seed or 0)
    base = load_base(task.plan, METHODS[settings.method or "sft"].head)
    if settings.gradient_checkpointing:
        base.config.use_cache = False
    return lamina.begin_stage(
        base,
        name=task.stage.name,
        parent=task.parent,
        mode=task.stage.mode,
        config=None if task.stage.mode == "continue" else adapter_config(settings),
        tokenizer=task.tokenizer,
    )


def _trainer(task: Task, model: PeftModel, following: Following, progress: Progress) -> Any:
    settings = task.settings
    method = METHODS[settings.method or "sft"]
    arguments = arguments_for(
        task.plan,
        task.stage,
        task.places.work,
        precision=precision_of(task.plan, model.get_base_model()),
        evaluates=task.data.evaluation is not None,
        lora_dropout=model.peft_config[task.stage.name].lora_dropout,
    )
    tally = Tally(progress.tally)
    callbacks: list[Any] = [Checks(model), following, tally]
    if settings.early_stopping_patience:
        stopping = EarlyStoppingCallback(settings.early_stopping_patience)
        stopping.early_stopping_patience_counter = progress.waited
        callbacks.append(stopping)
    job = Job(
        model=model,
        arguments=arguments,
        settings=settings,
        tokenizer=task.tokenizer,
        train=task.data.train,
        held_out=task.data.evaluation,
        reference=_reference(task, model) if method.has_reference else None,
        callbacks=tuple(callbacks),
        optimizer=_loraplus(model, arguments, settings),
    )
    trainer = method.trainer(job)
    tally.follow(trainer)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _reference(task: Task, model: PeftModel) -> Reference:
    named = task.settings.reference or "parent"
    if named == "parent":
        return reference_of(model, task.parent)
    return reference_of(model, None if named == "base" else task.places.root / named)


def _loraplus(model: PeftModel, arguments: Any, settings: Settings) -> Any:
    if settings.loraplus_lr_ratio is None:
        return None
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    rate = options.pop("lr")
    return lamina.create_loraplus_optimizer(
        model,
        kind,
        lr=rate,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **options,
    )


def _save(task: Task, model: PeftModel, metrics: dict[str, float]) -> str | None:
    data = task.data
    record = lamina.save_stage(
        model,
        task.places.stage,
        metrics=metrics,
        data={
            "method": task.settings.method,
            "format": data.format,
            "rows": data.rows,
            "digest": data.digest,
            "sources": [
                {"path": each.path, "rows": each.rows, "digest": each.digest, "hub": not each.files}
                for each in data.sources
            ],
        },
        tokenizer=task.tokenizer,
    )
    task.tokenizer.save_pretrained(task.places.stage)
    return record.weights


def _metrics(history: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The last loss, and the last evaluation."""
    found: dict[str, float] = {}
    for entry in history:
        if "loss" in entry:
            found["train_loss"] = entry["loss"]
        if "eval_loss" in entry:
            found["eval_loss"] = entry["eval_loss"]
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


@contextmanager
def _tensorboard(folder: Path) -> Iterator[None]:
    """Curves outlive the checkpoints that they would lie beside."""
    before = os.environ.get(_TENSORBOARD)
    os.environ.setdefault(_TENSORBOARD, str(folder))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_TENSORBOARD, None)
