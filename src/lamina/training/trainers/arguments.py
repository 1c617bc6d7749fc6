"""From the settings of a stage to the TRL config of its method."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lamina.errors import PlanError, nearest
from lamina.training.plan import Plan, StagePlan
from lamina.training.plan.settings import Settings
from lamina.training.trainers import METHODS

# Steps between checkpoints where a plan says nothing.
SAVE_STEPS = 100
# Setting -> the field of transformers' TrainingArguments that it is.
_COMMON = {
    name: name
    for name in (
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "optim",
        "neftune_noise_alpha",
        "logging_steps",
        "save_total_limit",
        "seed",
    )
}
# Fields that the run itself decides on -> what to use in the plan.
_OWNED = {
    "output_dir": "output_dir",
    "report_to": "report_to",
    "bf16": "dtype",
    "fp16": "dtype",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "resume_from_checkpoint": "nothing: a run resumes by itself",
    "overwrite_output_dir": "nothing: what changed is run again by itself",
    "save_strategy": "save_steps",
    "save_only_model": "nothing: a run has to be able to resume",
    "load_best_model_at_end": "early_stopping_patience",
    "push_to_hub": "nothing: a run pushes nothing",
    "model_init_kwargs": "dtype, attn_implementation, load_in_4bit ...",
    "sync_ref_model": "reference",
    "trust_remote_code": "trust_remote_code",
}


@dataclass(frozen=True)
class Precision:
    """How numbers are kept: the dtype that a forward computes in, and whether weights are codes."""

    dtype: torch.dtype = torch.float32


def faults_of(settings: Settings, stage: str) -> list[str]:
    """What a method can't be given, and what contradicts itself."""
    method = METHODS[settings.method or "sft"]
    known = {each.name for each in fields(method.config_class())}
    found = []
    for name in settings.trainer_args or {}:
        if name in _OWNED:
            found.append(f"{stage}: trainer_args.{name}: the run decides that; use {_OWNED[name]}")
        elif name not in known:
            close = nearest(name, known)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            found.append(f"{stage}: trainer_args.{name}: {method.trl[0]} has no such field{hint}")
    every, save = settings.eval_steps, settings.save_steps
    if settings.early_stopping_patience and save and (every is None or save % every):
        found.append(
            f"{stage}: save_steps={save}: the best step is looked for among checkpoints, so with "
            f"early stopping it is a multiple of eval_steps ({every})"
        )
    return found


def arguments_for(
    plan: Plan,
    stage: StagePlan,
    work: Path,
    *,
    precision: Precision | None = None,
    evaluates: bool = False,
    lora_dropout: float = 0.0,
) -> Any:
    """The TRL config of a stage.

    Args:
        plan: the plan.
        stage: one of its stages.
        work: where checkpoints go.
        precision: of the model.
        evaluates: whether there are held-out examples.
        lora_dropout: of the adapter that trains.

    Raises:
        PlanError: TRL refuses the settings.
    """
    settings = plan.settings_of(stage)
    method = METHODS[settings.method or "sft"]
    config = method.config_class()
    known = {each.name for each in fields(config)}
    values: dict[str, Any] = {}
    for setting, name in {**_COMMON, **method.settings}.items():
        value = getattr(settings, setting)
        if value is not None:
            values[name] = value
    values |= method.fixed
    values |= _surroundings(plan, stage, work, precision or Precision())
    values |= _saving(settings, evaluates=evaluates)
    values["gradient_checkpointing"] = bool(settings.gradient_checkpointing)
    if "disable_dropout" in known:
        # Dropout that was asked for is not taken away; without it the base's own is noise.
        values["disable_dropout"] = lora_dropout == 0
    values |= settings.trainer_args or {}
    try:
        with _quietly():
            return config(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise PlanError(
            f"Stage {stage.name!r} can't be trained as asked: {error}",
            cure=f"change the setting, or its trainer_args; {method.trl[0]} refuses it",
        ) from error


def _surroundings(plan: Plan, stage: StagePlan, work: Path, precision: Precision) -> dict[str, Any]:
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    return {
        "output_dir": str(work),
        "run_name": stage.name,
        "report_to": list(plan.report_to) or "none",
        "bf16": precision.dtype == torch.bfloat16,
        "fp16": precision.dtype == torch.float16,
        "use_cpu": not accelerated,
        "dataloader_pin_memory": accelerated,
        "disable_tqdm": True,
        "logging_first_step": True,
        # Else a loss that is no number is told as the mean of those that are: 0 where none is.
        "logging_nan_inf_filter": False,
        "log_level": "error",
    }


def _saving(settings: Settings, *, evaluates: bool) -> dict[str, Any]:
    every = settings.eval_steps
    chosen: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": settings.save_steps or SAVE_STEPS,
        "eval_strategy": "no",
    }
    if not evaluates:
        return chosen
    chosen |= {"eval_strategy": "steps", "eval_steps": every} if every else {}
    chosen |= {} if every else {"eval_strategy": "epoch"}
    if settings.early_stopping_patience:
        chosen |= {"save_steps": settings.save_steps or every} if every else {}
        chosen |= {} if every else {"save_strategy": "epoch"}
        chosen |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return chosen


@contextmanager
def _quietly() -> Iterator[None]:
    """TRL's settings set what newer releases of transformers call by another name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
        yield
