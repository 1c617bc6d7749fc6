"""What both sides are given: data in files, and one set of settings."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = "task.json"
STAGES = ("domain", "chat", "taste")
METHODS = {"domain": "pt", "chat": "sft", "taste": "dpo"}
_ROWS, _HELD_OUT = 64, 16


@dataclass(frozen=True)
class Task:
    """Plain text, then prompts with answers in a new adapter, then preferences in that one.

    Attributes:
        model: directory of the base and its tokenizer.
        mode: how the second stage is put on the first: "stack" or "merge".
        steps: of each stage.
        dropout: of the adapters.
        seed: of all that is drawn.
    """

    model: str
    mode: str = "stack"
    steps: int = 20
    dropout: float = 0.0
    seed: int = 42
    ranks: tuple[int, int] = (8, 4)
    learning_rates: tuple[float, float, float] = (2e-3, 2e-3, 5e-4)
    batch: int = 4
    length: int = 128
    warmup_steps: int = 2
    scheduler: str = "cosine"
    max_grad_norm: float = 1.0
    beta: float = 0.1

    def write(self, folder: Path) -> None:
        """Put it beside its data."""
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Task:
        """What was written; lists for tuples."""
        return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))


def plan_of(task: Task) -> dict[str, Any]:
    """The task as a plan of Lamina's."""
    rates = dict(zip(STAGES, task.learning_rates, strict=True))
    modes: dict[str, dict[str, Any]] = {
        "domain": {"lora_r": task.ranks[0]},
        "chat": {"lora_r": task.ranks[1], "mode": task.mode},
        "taste": {"mode": "continue", "beta": task.beta},
    }
    return {
        "model_name_or_path": task.model,
        "output_dir": "lamina",
        "defaults": {
            "lora_dropout": task.dropout,
            "lora_target_modules": "all-linear",
            "max_steps": task.steps,
            "per_device_train_batch_size": task.batch,
            "max_length": task.length,
            "lr_scheduler_type": task.scheduler,
            "warmup_steps": task.warmup_steps,
            "max_grad_norm": task.max_grad_norm,
            "seed": task.seed,
            "logging_steps": 1,
            "eval_steps": task.steps,
        },
        "stages": [
            {
                "name": name,
                "method": METHODS[name],
                "learning_rate": rates[name],
                "datasets": f"{name}.jsonl",
                "eval_datasets": f"{name}.held_out.jsonl",
                **modes[name],
            }
            for name in STAGES
        ],
    }


def prepare(folder: Path, task: Task, texts: Sequence[str]) -> None:
    """Write data, settings and plan.

    Args:
        folder: where to.
        task: the settings.
        texts: paragraphs, of which the rows are made.
    """
    draw = random.Random(task.seed)
    rows = [_rows(part, draw) for part in (texts[:_ROWS], texts[_ROWS : _ROWS + _HELD_OUT])]
    for name in STAGES:
        for ending, made in zip(("jsonl", "held_out.jsonl"), rows, strict=True):
            _write(folder / f"{name}.{ending}", made[name])
    task.write(folder)
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan_of(task), sort_keys=False))


def _rows(texts: Sequence[str], draw: random.Random) -> dict[str, list[dict[str, str]]]:
    ends = [text.index(" ", len(text) // 3) for text in texts]
    halves = [(text[:end], text[end:]) for text, end in zip(texts, ends, strict=True)]
    others = [answer for _, answer in halves]
    draw.shuffle(others)
    others = [
        other if other != answer else others[place - 1]
        for place, (other, (_, answer)) in enumerate(zip(others, halves, strict=True))
    ]
    return {
        "domain": [{"text": text} for text in texts],
        "chat": [{"prompt": asked, "completion": answer} for asked, answer in halves],
        "taste": [
            {"prompt": asked, "chosen": answer, "rejected": other}
            for (asked, answer), other in zip(halves, others, strict=True)
        ],
    }


def _write(file: Path, rows: Iterable[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def paragraphs() -> list[str]:
    """Of the language reference that Python brings: as many as are needed, not too short."""
    from lamina.demo.corpus import stage_texts

    prose = stage_texts()[0].train
    found = [" ".join(each.split()) for each in prose.split("\n\n")]
    return list(dict.fromkeys(each[:400] for each in found if len(each) >= 120))
