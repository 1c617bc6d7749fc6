"""Where something new is saved: a directory of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lamina.errors import CheckpointError
from lamina.storage.atomic import check_writable


def check_destination(
    out: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str]], *, force: bool = False
) -> Path:
    """The directory to save to; neither it nor anything in it has been touched.

    Args:
        out: the directory.
        sources: what is read from; a hub id is no directory.
        force: save into a directory that has files already.

    Raises:
        CheckpointError: it is one of the sources, has files already, or can't be written.
        DirectoryInUseError: another process writes to it.
    """
    place = Path(out).expanduser()
    check_writable(place)
    # As a save resolves it: `a/../b` is `b` even where there is no `a`.
    real = Path(os.path.realpath(place))
    for source in sources:
        folder = Path(os.path.realpath(Path(source).expanduser()))
        if os.fspath(source) and folder.is_dir() and real.is_dir() and folder.samefile(real):
            raise CheckpointError(
                f"'{place}' is what is read from; it would be overwritten.",
                cure="save to another directory",
            )
    names = sorted(entry.name for entry in real.iterdir()) if real.is_dir() else []
    if names and not force:
        raise CheckpointError(
            f"'{place}' is not empty.",
            faults=[f"it has '{name}'" for name in names[:6]],
            cure="choose another directory, or force=True (--force) to replace the adapter in it",
        )
    return place
