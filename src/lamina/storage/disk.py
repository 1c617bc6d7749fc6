"""What a full or failing disk says, in the one error of a save."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina.errors import CheckpointError, LaminaError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_BROKEN = frozenset({errno.EFBIG, errno.EIO, errno.EROFS})


@contextmanager
def reported(target: Path) -> Iterator[None]:
    """Turn the system's refusals into the one error of a save."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LaminaError):
            raise
        _raise_for_disk(error, target)
        raise CheckpointError(
            f"Can't save to '{target}': {error.strerror or error}"
            + (f" ('{error.filename}')." if error.filename else "."),
            cure="save to another directory, or mend that and save again",
        ) from error


@contextmanager
def disk_faults_reported(target: Path) -> Iterator[None]:
    """Do so while a writer of any kind writes, whose other errors come through as they are."""
    try:
        yield
    except Exception as error:
        _raise_for_disk(error, target)
        raise


def is_read_only(folder: Path) -> bool:
    """Whether the filesystem that `folder` is on takes no changes, as far as the system tells."""
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except (AttributeError, OSError):
        return False


def _raise_for_disk(error: Exception, target: Path) -> None:
    number = _system_number(error)
    if number not in _FULL | _BROKEN:
        return
    if number in _FULL:
        what, cure = "No space left to save", "free some space, or save to another disk"
    else:
        what = f"{os.strerror(number)}: the disk refused to save"
        cure = "mend the disk (or its limits: ulimit -f), or save to another one"
    raise CheckpointError(
        f"{what} '{target}'; what was there before is untouched.",
        faults=[str(error), *_room(target)],
        cure=cure,
    ) from error


def _system_number(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    # The safetensors writer has an error class of its own with the system's number in the text.
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0


def _room(target: Path) -> list[str]:
    """How much room the disk has, where the system tells."""
    folder = target
    while not folder.is_dir():
        folder = folder.parent
    try:
        status = os.statvfs(folder)
    except (AttributeError, OSError):
        return []
    while not os.path.ismount(folder):
        folder = folder.parent
    free, total = (count * status.f_frsize for count in (status.f_bavail, status.f_blocks))
    told = f"the disk at '{folder}' has {free:,} of {total:,} bytes free"
    if status.f_files and not status.f_favail:
        told += ", and room for no more files"
    return [told]
