"""A saved adapter directory, how to save one, and how to look at what is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lamina.storage.atomic import atomic_directory

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
INDEX = "adapter_model.safetensors.index.json"
SHARDS = tuple(f"adapter_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))


def save(target: Path, content: str, **options: object) -> None:
    with atomic_directory(target, **options) as staging:  # type: ignore[arg-type]
        (staging / WEIGHTS).write_text(content)
        (staging / CONFIG).write_text(content)


def fail_halfway(target: Path, error: BaseException) -> None:
    with atomic_directory(target) as staging:
        (staging / WEIGHTS).write_text("half")
        raise error


def never_entered(target: Path) -> None:
    with atomic_directory(target):
        pytest.fail("it began to write")


def clash(target: Path) -> None:
    with atomic_directory(target) as staging:
        (staging / "checkpoint-10").write_text("a file")
        (staging / "tokenizer.json").mkdir()


def tree(directory: Path) -> dict[str, str]:
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_text()
    return found


def hidden(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


KEPT = {
    f"checkpoint-10/{CONFIG}": "ten",
    f"checkpoint-10/sft/{WEIGHTS}": "ten sft",
    "tokenizer.json": "tokens",
    "latest": "-> checkpoint-10",
    "gone": "-> nowhere",
}


def fill(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def write_index(directory: Path, names: tuple[Any, ...], index: str = INDEX) -> None:
    weight_map = {f"tensor.{turn}": name for turn, name in enumerate(names)}
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
