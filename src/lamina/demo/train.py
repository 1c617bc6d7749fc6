"""One stage of the demo, trained by transformers' `Trainer`, with a progress bar."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lamina.model import PeftModel, check_gradients, preflight

BATCH = 8
LEARNING_RATE = 3e-3
_WARM_UP = 10


class _Blocks(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.data[index], "labels": self.data[index]}


class _Bar(TrainerCallback):  # type: ignore[misc]
    """Moves the bar, and checks the gradients of the first step."""

    def __init__(self, progress: Progress, title: str, steps: int) -> None:
        self.progress = progress
        self.task = progress.add_task(title, total=steps, loss="")
        self.checked = False

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.checked:
            check_gradients(model)
            self.checked = True

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.progress.advance(self.task)

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {float(logs['loss']):.2f}")


def train_stage(
    model: PeftModel,
    data: torch.Tensor,
    *,
    steps: int,
    seed: int,
    title: str,
    console: Console,
) -> None:
    """Train what is trainable in a model on blocks of tokens, (n, length).

    Raises:
        PreflightError: nothing, or the wrong thing, would train.
    """
    preflight(model)
    progress = Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[loss]:10}"),
        TimeRemainingColumn(),
        console=console,
    )
    with tempfile.TemporaryDirectory() as scratch, progress:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=min(_WARM_UP, steps // 2),
            max_grad_norm=1.0,
            logging_steps=max(1, min(5, steps)),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_Blocks(data),
            callbacks=[_Bar(progress, title, steps)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
