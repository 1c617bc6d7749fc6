"""Plans over a tiny base that is saved with its tokenizer, and data for every method."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from lamina.training.plan import Plan, read_plan
from lamina.training.run import RunResult, Told, run_plan
from tests import models
from tests.ecosystem import texts

QUICK: dict[str, Any] = {
    "lora_r": 4,
    "lora_target_modules": ["q_proj", "v_proj"],
    "learning_rate": 0.02,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "max_length": 32,
    "save_steps": 2,
    "logging_steps": 1,
}
ROWS: dict[str, Callable[[], Any]] = {
    "pt": texts.texts,
    "sft": lambda: texts.rows(
        16, prompt=texts.sentence, completion=lambda row: " " + texts.sentence(row + 6)
    ),
    "dpo": texts.preferences,
    "kto": texts.judged,
    "orpo": texts.preferences,
    "reward": texts.preferences,
    "grpo": lambda: texts.rows(prompt=texts.sentence),
}


def write_rows(file: Path, rows: Iterable[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_base(folder: Path, **changes: Any) -> None:
    models.tiny_llama(**changes).save_pretrained(folder)
    texts.tokenizer().save_pretrained(folder)


def write_plan(
    folder: Path, stages: Iterable[dict[str, Any]], *, base: Path | None = None, **changes: Any
) -> Path:
    """A plan file in `folder`, with data for each stage's method, over a base in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if base is None:
        base = folder / "base"
        write_base(base)
    written = []
    for stage in stages:
        file = folder / f"{stage['method']}.jsonl"
        if not file.exists():
            write_rows(file, ROWS[stage["method"]]())
        written.append({"datasets": file.name, **stage})
    output = folder / changes.pop("output_dir", "out")
    plan = {
        "output_dir": str(output),
        "model_name_or_path": str(base),
        "defaults": QUICK,
        "stages": written,
        **changes,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def run(
    path: Path,
    *changes: str,
    console: Told | None = None,
    resume: bool = True,
    report: bool = False,
) -> RunResult:
    plan: Plan = read_plan(path, changes)
    return run_plan(plan, root=path.parent, console=console, resume=resume, report=report)


def tensors(stage: str | Path) -> dict[str, Tensor]:
    return load_file(Path(stage) / "adapter_model.safetensors")


def log_of(folder: Path, stage: str) -> list[dict[str, Any]]:
    file = folder / "out" / "logs" / f"{stage}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]
