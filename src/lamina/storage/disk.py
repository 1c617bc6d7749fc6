"""What a full or failing disk says, in the one error of a save."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lamina.errors import CheckpointError, LaminaError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_BROKEN = frozenset({errno.EFBIG, errno.EIO, errno.EROFS})
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos \d+ vs \d+")
# Bytes; a disk on which less is free is full.
_LITTLE = 1 << 16


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


@dataclass(frozen=True)
class Refusal:
    """What a disk has against being written.

    Attributes:
        what: the beginning of a sentence that goes on with "to ...".
        cure: what mends it.
        faults: what the system said, and how much room there is.
    """

    what: str
    cure: str
    faults: tuple[str, ...]


def refusal(error: BaseException, target: Path) -> Refusal | None:
    """What the disk of `target` has against being written, if that is what an error is about."""
    number = _system_number(error, target)
    if number not in _FULL | _BROKEN:
        return None
    if number in _FULL:
        what, cure = "No space left", "free some space"
    else:
        what = f"{os.strerror(number)}: the disk refused"
        cure = "mend the disk (or its limits: ulimit -f)"
    return Refusal(what, cure, (str(error), *_room(target)))


def _raise_for_disk(error: Exception, target: Path) -> None:
    found = refusal(error, target)
    if found is not None:
        raise CheckpointError(
            f"{found.what} to save '{target}'; what was there before is untouched.",
            faults=found.faults,
            cure=f"{found.cure}, or save to another disk",
        ) from error


def _system_number(error: BaseException, target: Path) -> int:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    # The safetensors writer has an error class of its own with the system's number in the text.
    found = re.search(r"(?:os error|because of errno) (\d+)", str(error))
    if found:
        return int(found[1])
    # The writer of torch.save says only that it couldn't.
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error)):
        return errno.ENOSPC if _is_full(target) else errno.EIO
    return 0


def _is_full(target: Path) -> bool:
    return shutil.disk_usage(_nearest_folder(target)).free < _LITTLE


def _nearest_folder(target: Path) -> Path:
    return next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())


def _room(target: Path) -> list[str]:
    """How much room the disk has, where the system tells."""
    folder = _nearest_folder(target)
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
