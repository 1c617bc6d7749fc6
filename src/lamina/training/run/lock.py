"""One run at a time in a directory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina.errors import DirectoryInUseError
from lamina.storage.staging import held

FILE = ".run.lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Have a directory to oneself; the system takes the lock back however a process ends.

    Raises:
        DirectoryInUseError: another run has it.
    """
    file = directory / FILE
    file.touch()
    with held(file) as ours:
        if ours is False:
            raise DirectoryInUseError(
                f"Another run ({_owner(file)}) is working in '{directory}'.",
                cure=f"wait for it, stop it, or give another output_dir; lamina status {directory} "
                "shows how far it is",
            )
        file.write_text(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield


def is_locked(directory: Path) -> bool:
    """Whether a run is going on in a directory."""
    file = directory / FILE
    if not file.is_file():
        return False
    with held(file) as ours:
        return ours is False


def _owner(file: Path) -> str:
    return file.read_text().strip() or "of an unknown process"
