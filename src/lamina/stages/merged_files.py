"""What lies beside a merged model's weights: configs, tokenizer, licence. Copied, never run."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lamina.errors import CheckpointError, LaminaError
from lamina.storage.untrusted import read_json

# What a saved model consists of; of an older one in the same place nothing may survive.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_TOKENIZER = (
    *TOKENIZER_FILES,
    "tokenizer*.json",
    "*.tiktoken",
    "*.model",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)
_BESIDE = (
    "generation_config.json",
    "*processor_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


def refuse_occupied(target: Path, force: bool) -> None:
    """Refuse a directory that has files, unless they are to be replaced."""
    if force or not target.is_dir():
        return
    names = sorted(entry.name for entry in target.iterdir())
    if names:
        raise CheckpointError(
            f"'{target}' is not empty.",
            faults=[f"it has '{name}'" for name in names[:6]],
            cure="save to another directory, or pass force=True (--force) to replace the model",
        )


def refuse_sources(target: Path, sources: Sequence[str]) -> None:
    """Refuse to write where one of these lies."""
    for source in sources:
        place = Path(source).expanduser()
        if source and place.is_dir() and target.is_dir() and place.samefile(target):
            raise CheckpointError(
                f"'{target}' is where the adapter or its base lies; it would be overwritten.",
                cure="save to another directory",
            )


def files_beside(base: Path, adapter: Path) -> tuple[list[tuple[Path, str]], str | None]:
    """(directory and name of what a model needs beside weights and config, where its tokenizer is).

    The adapter's tokenizer goes before the base's: it may have new tokens. Python files are named
    only where the base's config names them: without them it couldn't be opened at all. They are
    not run.

    Raises:
        CheckpointError: a file is a link that leads out of its directory.
    """
    patterns = [*_BESIDE, *(["*.py"] if _has_own_code(base) else [])]
    found = [(base, name) for name in _named(base, patterns)]
    for source in (adapter, base):
        if any((source / name).is_file() for name in TOKENIZER_FILES):
            return [*found, *((source, name) for name in _named(source, _TOKENIZER))], str(source)
    return found, None


def copy_beside(base: Path, adapter: Path, target: Path) -> str | None:
    """Copy them; where the tokenizer came from."""
    found, tokenizer = files_beside(base, adapter)
    for source, name in found:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return tokenizer


def _has_own_code(base: Path) -> bool:
    for name in ("config.json", "tokenizer_config.json"):
        try:
            found = read_json(base / name)
        except (LaminaError, ValueError):
            continue
        if isinstance(found, dict) and found.get("auto_map"):
            return True
    return False


def _named(source: Path, patterns: Sequence[str]) -> list[str]:
    found = [n for n in _names(source) if any(fnmatch.fnmatchcase(n, each) for each in patterns)]
    for name in found:
        _refuse_way_out(source, name)
    return found


def _refuse_way_out(source: Path, name: str) -> None:
    """Refuse a link to somewhere else: what is copied may be handed on to others."""
    place, leads_to = source.resolve(), (source / name).resolve()
    roots = [place]
    if place.parent.name == "snapshots":
        # The hub's cache keeps the files of all revisions in one place.
        roots.append(place.parent.parent / "blobs")
    if not any(leads_to.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"'{source / name}' is a link that leads out of its directory.",
            faults=[f"to '{leads_to}'"],
            cure="put a copy in its place, or remove it",
        )


def _names(directory: Path) -> Iterator[str]:
    for entry in sorted(directory.iterdir()):
        if entry.is_file():
            yield entry.name
        elif entry.name == "additional_chat_templates" and entry.is_dir():
            yield from (f"{entry.name}/{file.name}" for file in entry.iterdir() if file.is_file())


def write_config(base: Path, changed: Mapping[tuple[str, ...], Any], target: Path) -> None:
    """Copy `config.json`, with other values at some places; all else stays as it is.

    Args:
        base: the base's directory.
        changed: the way to a value -> the value.
        target: where it is written.
    """
    if not changed:
        shutil.copyfile(base / "config.json", target / "config.json")
        return
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for way, value in changed.items():
        inside = config
        for part in way[:-1]:
            inside = inside.setdefault(part, {})
        inside[way[-1]] = value
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
