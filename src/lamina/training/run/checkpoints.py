"""Checkpoints of a stage that can be gone on from: those that were written to their end."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from lamina.storage.carry import sync_file
from lamina.storage.staging import remove_tree
from lamina.storage.whole import write_whole

_MARK = "lamina_complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(checkpoint: Path, stage_hash: str) -> None:
    """Note that a checkpoint is complete, and which stage it is of."""
    sizes = {}
    for folder, _, names in os.walk(checkpoint):
        for name in names:
            file = Path(folder, name)
            sync_file(file)
            sizes[str(file.relative_to(checkpoint))] = file.stat().st_size
    sizes.pop(_MARK, None)
    write_whole(checkpoint / _MARK, json.dumps({"hash": stage_hash, "files": sizes}))


def newest(work: Path, stage_hash: str) -> Path | None:
    """The newest complete checkpoint of this very stage; whatever else lies there is removed."""
    found = None
    for checkpoint in _all(work):
        if found is None and _is_whole(checkpoint, stage_hash):
            found = checkpoint
        elif not _is_whole(checkpoint, stage_hash):
            remove_tree(checkpoint)
    return found


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was made at."""
    named = _NAME.fullmatch(checkpoint.name)
    return int(named[1]) if named else 0


def _all(work: Path) -> list[Path]:
    """Newest first."""
    if not work.is_dir():
        return []
    named = [each for each in work.iterdir() if _NAME.fullmatch(each.name) and each.is_dir()]
    return sorted(named, key=step_of, reverse=True)


def _is_whole(checkpoint: Path, stage_hash: str) -> bool:
    try:
        told = json.loads((checkpoint / _MARK).read_text())
        sizes = {name: (checkpoint / name).stat().st_size for name in told["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(told.get("hash") == stage_hash and sizes == told["files"])
