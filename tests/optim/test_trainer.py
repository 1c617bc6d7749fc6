"""All of them under transformers' Trainer, saved and resumed by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lamina
from tests import models
from tests.adapters import llama_adapter
from tests.optim.training import moved, weights

Make = Callable[[Any], torch.optim.Optimizer]

MAKERS: dict[str, Make] = {
    "loraplus": lambda model: lamina.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4
    ),
    "lorafa": lambda model: lamina.create_lorafa_optimizer(model, 4, 8, lr=1e-3),
    "riemannian": lambda model: lamina.create_riemannian_optimizer(
        model, torch.optim.AdamW, lr=1e-3
    ),
}


def train(make: Make, output: Path, resume: str | None = None) -> lamina.PeftModel:
    model = llama_adapter()
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rows = [{"input_ids": row, "labels": row} for row in models.token_ids(batch=4, length=6)]
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=3,
        per_device_train_batch_size=2,
        save_steps=2,
        save_strategy="steps",
        report_to=[],
        use_cpu=True,
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule)
    )
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("name", MAKERS)
def test_trained_and_resumed(name: str, tmp_path: Path) -> None:
    model = train(MAKERS[name], tmp_path / "run")
    changed = moved(weights(llama_adapter()), model)
    factors = ("lora_B",) if name == "lorafa" else ("lora_A", "lora_B")
    assert changed == {n for n, _ in model.named_parameters() if any(f in n for f in factors)}
    again = train(MAKERS[name], tmp_path / "again", str(tmp_path / "run" / "checkpoint-2"))
    for key, value in weights(again).items():
        torch.testing.assert_close(value, weights(model)[key], rtol=1e-6, atol=1e-7)
