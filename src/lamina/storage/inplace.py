"""Replace a directory's files one by one: for a directory that can't be moved.

Weaker than an exchange: each file is whole at any instant, but a crash on the way leaves new
files beside old ones. New weights come first and `adapter_config.json` last.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lamina.storage.carry import Written, is_folder, sync_file, sync_folder
from lamina.storage.staging import hidden_sibling, remove_tree, staging_directory

_LAST = "adapter_config.json"


def replace_in_place(
    staging: Path, target: Path, written: Written, is_owned: Callable[[str], bool]
) -> None:
    """Move what was written into `target` and remove what is owned there and wasn't written.

    Raises:
        OSError: a file can't be moved or removed. While the files are only brought near (a full
            disk shows there), `target` is untouched.
    """
    if staging.parent == target:
        _replace(staging, target, written, is_owned)
        return
    with staging_directory(target, target) as near:
        for folder in written.folders:
            (near / folder).mkdir(parents=True, exist_ok=True)
        for file in written.files:
            _move(staging / file, near / file)
        _replace(near, target, written, is_owned)


def _replace(near: Path, target: Path, written: Written, is_owned: Callable[[str], bool]) -> None:
    for folder in sorted(written.folders):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for file in sorted(written.files, key=_turn):
        # A folder of the target may be a filesystem of its own.
        _move(near / file, target / file)
    new = {*written.files, *written.folders}
    for folder in written.folders:
        for name in os.listdir(target / folder):
            if is_owned(name) and folder / name not in new:
                _remove(target / folder / name)
        sync_folder(target / folder)


def _turn(file: Path) -> tuple[int, str]:
    if file.name == _LAST:
        return 2, str(file)
    is_weights = file.suffix in (".safetensors", ".bin")
    return (0 if is_weights else 1), str(file)


def _move(source: Path, goal: Path) -> None:
    """Put a file in another's place in one step, also from another filesystem."""
    try:
        os.replace(source, goal)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        near = hidden_sibling(goal, "saving")
        try:
            shutil.copy2(source, near, follow_symlinks=False)
            sync_file(near)
            os.replace(near, goal)
        finally:
            near.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if is_folder(path):
        remove_tree(path)
        return
    with suppress(FileNotFoundError):
        os.unlink(path)
