"""Hidden directories beside a target: named, marked as in use, and swept away when abandoned.

A save in progress holds a lock on its directory, which the system releases at its death, however
it dies. So a staging directory without a lock is nobody's, whatever process ids have been reused,
and one with a lock tells a second writer that there is a first.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lamina.errors import DirectoryInUseError

if sys.platform != "win32":
    import fcntl

# Where the filesystem has no locks, only the age tells: no save takes a day.
_ABANDONED_AFTER_S = 24 * 3600.0
# Publishing takes milliseconds, a second where there are thousands of files to carry over.
_TURN_S = 30.0
# Process, second since 1970 (which older versions left out), and what makes it unique.
_TOKEN = r"(\d+)-([0-9a-f]{8})?[0-9a-f]{8}"


def hidden_sibling(target: Path, kind: str, folder: Path | None = None) -> Path:
    """A free name `.NAME.KIND-PID-TIMExxxxxxxx` for `target`, beside it or in `folder`."""
    token = f"{os.getpid()}-{int(time.time()):08x}{secrets.token_hex(4)}"
    return (folder or target.parent) / f".{_stem(target)}.{kind}-{token}"


def hidden_siblings(target: Path, kind: str, folder: Path | None = None) -> list[Path]:
    """All directories that `hidden_sibling` named for `target`, of any process, newest last."""
    pattern = re.compile(rf"\.{re.escape(_stem(target))}\.{kind}-{_TOKEN}")
    found = []
    with suppress(OSError), os.scandir(folder or target.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                found.append((entry.stat().st_ctime, Path(entry.path)))
    return [path for _, path in sorted(found)]


@contextmanager
def staging_directory(target: Path, folder: Path) -> Iterator[Path]:
    """A new locked directory in `folder` for `target`; whatever lies there at the end is removed.

    Raises:
        OSError: `folder` can't be written.
    """
    while True:
        staging = hidden_sibling(target, "saving", folder)
        os.mkdir(staging)
        with held(staging) as ours:
            # A sweep that came between the two lines above has taken it for abandoned.
            if ours is False or not staging.is_dir():
                continue
            try:
                yield staging
            finally:
                remove_tree(staging)
            return


@contextmanager
def held(directory: Path, patience_s: float = 0.0) -> Iterator[bool | None]:
    """Mark `directory` as in use until the end, at a new path too if it is renamed meanwhile.

    Yields True if it is ours now, False if another still holds it after `patience_s` seconds,
    None where there are no locks.
    """
    descriptor = _open_directory(directory)
    deadline = time.monotonic() + patience_s
    try:
        ours = None if descriptor is None else _try_lock(descriptor)
        while descriptor is not None and ours is False and time.monotonic() < deadline:
            time.sleep(0.005)
            ours = _try_lock(descriptor)
        yield ours
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def turn(target: Path, longest_s: float = _TURN_S) -> Iterator[None]:
    """Let the saves that begin or end at the same moment in one folder do so one by one.

    Who has waited `longest_s` seconds goes on all the same: others may lock folders too.
    """
    # A save within another's staging directory has it to itself, and its lock is taken.
    private = re.search(rf"\.saving-{_TOKEN}$", target.parent.name)
    while True:
        before = _inode(target.parent)
        with held(target.parent, 0.0 if private else min(longest_s, _TURN_S)):
            # A save of the folder itself may have replaced it while this one waited.
            if _inode(target.parent) != before:
                continue
            yield
            return


def sweep(target: Path, own: Path | None = None) -> None:
    """Remove what dead saves of `target`, all but `own`, left behind, beside it and inside it.

    Raises:
        DirectoryInUseError: one of the saves is alive.
    """
    if os.path.lexists(target):
        # Without the target an old tree is not rubbish but the only copy.
        for aside in hidden_siblings(target, "old"):
            with held(aside) as ours:
                _remove_if_dead(aside, ours)
    living = None
    for staging in _stagings(target):
        if staging != own:
            with held(staging) as ours:
                _remove_if_dead(staging, ours)
                living = staging if ours is False else living
    if living is not None:
        raise _in_use(target, living)


def check_free(target: Path) -> None:
    """Ask, without changing anything, whether another save of `target` goes on.

    Raises:
        DirectoryInUseError: it does.
    """
    for staging in _stagings(target):
        with held(staging) as ours:
            if ours is False:
                raise _in_use(target, staging)


def in_use(target: Path, pid: int | str, since: float | None = None) -> DirectoryInUseError:
    """The error that tells a second writer of the first.

    Args:
        target: the directory that both want.
        pid: the process that was first.
        since: seconds since 1970.
    """
    began = "" if since is None else time.strftime(" since %H:%M:%S", time.localtime(since))
    who = "Another thread of this process" if str(pid) == str(os.getpid()) else "Another process"
    return DirectoryInUseError(
        f"{who} ({pid}) has been writing to '{target}'{began}; nothing of this save was written.",
        cure="wait until it is done, or save to another directory; where several processes train "
        "together, only the first one saves",
    )


def _in_use(target: Path, living: Path) -> DirectoryInUseError:
    found = re.search(f"{_TOKEN}$", living.name)
    pid, since = (found[1], found[2]) if found else ("unknown", None)
    return in_use(target, pid, int(since, 16) if since else None)


def _stagings(target: Path) -> list[Path]:
    return hidden_siblings(target, "saving") + hidden_siblings(target, "saving", target)


def _remove_if_dead(leftover: Path, ours: bool | None) -> None:
    if ours or (ours is None and _age(leftover) > _ABANDONED_AFTER_S):
        remove_tree(leftover)


def remove_tree(directory: Path) -> None:
    """Delete `directory` with all in it, as far as that is permitted; it may be gone already."""
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.is_dir():
        return
    for folder, _, _ in os.walk(directory):
        with suppress(OSError):
            os.chmod(folder, 0o700)
    shutil.rmtree(directory, ignore_errors=True)


def _stem(target: Path) -> str:
    # Room for the rest of the name: filesystems allow 255 bytes.
    name = os.fsencode(target.name)
    return target.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()[:32]


def _open_directory(directory: Path) -> int | None:
    try:
        return os.open(directory, os.O_RDONLY)
    except OSError:
        return None


def _try_lock(descriptor: int) -> bool | None:
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _inode(directory: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(directory)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _age(directory: Path) -> float:
    try:
        return time.time() - directory.stat().st_ctime
    except OSError:
        return 0.0
