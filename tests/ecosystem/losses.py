"""The losses of one run of a trainer, on one of two sides.

python tests/ecosystem/losses.py peft|lamina trainer|sft|dpo OUTPUT.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def run(name: str, folder: Path) -> list[float]:
    """Train a fresh adapter with dropout for a few steps from a fixed seed."""
    import peft
    import torch
    import transformers
    import trl

    from tests import models
    from tests.ecosystem import texts

    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model, tokenizer = models.tiny_llama(), texts.tokenizer()
    torch.manual_seed(7)
    if name == "trainer":
        rows = [tokenizer(text)["input_ids"] for text in texts.texts()["text"]]
        trainer = transformers.Trainer(
            model=peft.get_peft_model(model, config),
            args=transformers.TrainingArguments(**settings),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        )
    elif name == "sft":
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(max_length=32, **settings),
            train_dataset=texts.texts(),
            processing_class=tokenizer,
            peft_config=config,
        )
    else:
        trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(max_length=32, **settings),
            train_dataset=texts.preferences(),
            processing_class=tokenizer,
            peft_config=config,
        )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    side, name, output = sys.argv[1:]
    if side == "lamina":
        from tests.ecosystem.without import hide

        hide("peft")
        from lamina.interop.peft import install

        install()
    import peft

    assert peft.LoraConfig.__module__.startswith("lamina") == (side == "lamina")
    with tempfile.TemporaryDirectory() as folder:
        losses = run(name, Path(folder))
    Path(output).write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main()
