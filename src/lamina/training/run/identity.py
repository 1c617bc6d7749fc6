"""What a stage's result depends on, as a hash: the same hash, the same result."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lamina.training.plan import Plan, StagePlan
from lamina.training.plan.settings import Settings

Inputs = dict[str, Any]

_PACKAGES = ("lamina", "torch", "transformers", "trl", "accelerate", "datasets")
# Settings that change how a stage is watched, or where from it goes on, but not what it becomes.
_WATCHING = {"logging_steps", "save_total_limit", "per_device_eval_batch_size", "gate"}
_DIGESTS = {"data", "base", "tokenizer", "chat_template"}
# What data is, its digest says; where it lies doesn't matter.
_ELSEWHERE = {"datasets", "eval_datasets"}
# Files of a base that matter, and how much of each is looked at.
_OF_MODELS = {".json", ".jinja", ".model", ".txt", ".safetensors", ".bin"}
_BLOCKS, _BLOCK = 256, 1 << 18
_BASE = (
    "model_revision",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "attn_implementation",
)


def inputs_of(
    plan: Plan,
    stage: StagePlan,
    *,
    data: str,
    parent: str | None,
    reference: str | None = None,
    template: str | None = None,
) -> Inputs:
    """Everything that a stage's result depends on, by names that can be told to a person.

    Args:
        plan: the plan.
        stage: one of its stages.
        data: the digest of its examples.
        parent: what identifies the stage before and its weights; None for the first stage.
        reference: likewise of the stage that is the reference, where that is an earlier one.
        template: of chats.
    """
    settings = plan.settings_of(stage)
    found: Inputs = {"name": stage.name, "mode": stage.mode, "data": data, "parent": parent}
    found |= {name: getattr(plan, name) for name in _BASE}
    found["base"] = _of_files(plan.model_name_or_path)
    tokenizer = plan.tokenizer_name_or_path
    found["tokenizer"] = None if tokenizer is None else _of_files(tokenizer)
    found["chat_template"] = _text_digest(template)
    for name, value in settings.model_dump(mode="json").items():
        if name not in _WATCHING | _ELSEWHERE and value is not None:
            found[name] = value
    if not settings.early_stopping_patience:
        # Only the step that is taken for the best depends on when checkpoints are made.
        found.pop("save_steps", None)
    if reference is not None:
        found["reference stage"] = reference
    for name in settings.reward_functions or ():
        found[f"source of {name}"] = source_digest(name)
    found |= {f"version of {name}": found_version for name, found_version in _versions(settings)}
    return found


def base_identity(plan: Plan, template: str | None) -> str:
    """What the answers of a plan's base depend on, but for the versions of libraries."""
    names = [plan.model_name_or_path, plan.tokenizer_name_or_path or plan.model_name_or_path]
    return digest(
        {
            **{name: getattr(plan, name) for name in _BASE},
            "files": [_of_files(name) for name in names],
            "chat_template": _text_digest(template),
        }
    )


def digest(inputs: Mapping[str, Any]) -> str:
    """The hash of what `inputs_of` found."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two runs, in words."""
    told = []
    for name in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name in _DIGESTS or name.startswith("source of "):
            told.append(f"{name} changed")
        elif name in {"parent", "reference stage"}:
            told.append("the stage before changed" if name == "parent" else f"{name} changed")
        else:
            told.append(f"{name}: {_short(old)} -> {_short(new)}")
    return told


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _versions(settings: Settings) -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _text_digest(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _of_files(path: str) -> str:
    """A hub id, or what lies in a directory, wherever that is."""
    return _local_digest(path) or path


def _local_digest(path: str) -> str | None:
    """Of a base that lies here: small files whole, of large ones some of each part."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    told = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _OF_MODELS and file.is_file():
            told.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            for block in _blocks(file):
                told.update(block)
    return told.hexdigest()


def _blocks(file: Path) -> Iterator[bytes]:
    """All of a small file, else blocks at equal distances: another training changes every one."""
    size = file.stat().st_size
    count = min(_BLOCKS, -(-size // _BLOCK))
    with file.open("rb") as opened:
        for number in range(count):
            opened.seek(number * max(_BLOCK, size // count))
            yield opened.read(_BLOCK)


def source_digest(name: str) -> str:
    """SHA-256 of the module of `package.module:function`; its version if it has no source."""
    module = importlib.import_module(name.partition(":")[0])
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
    except (OSError, TypeError):
        return str(getattr(module, "__version__", "no source"))
