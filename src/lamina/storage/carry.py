"""Bring what a new directory doesn't have over from the old one, and make files durable."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from stat import S_IMODE, S_ISREG

from lamina.storage.exchange import PinnedError

if sys.platform != "win32":
    import fcntl

Owned = Iterable[str] | Callable[[str], bool]

_FATAL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOENT})


@dataclass(frozen=True)
class Written:
    """What a writer put into its staging directory, as paths relative to it."""

    files: tuple[Path, ...]
    folders: frozenset[Path]

    @classmethod
    def survey(cls, staging: Path) -> Written:
        """All files and links, and all real folders (the staging itself is `Path('.')`)."""
        files: list[Path] = []
        folders: set[Path] = set()
        for here, subfolders, names in os.walk(staging):
            inside = Path(here).relative_to(staging)
            folders.add(inside)
            links = [name for name in subfolders if os.path.islink(os.path.join(here, name))]
            files += [inside / name for name in (*names, *links)]
        return cls(tuple(sorted(files)), frozenset(folders))

    def clashes(self, old: Path) -> list[str]:
        """The paths that are files on one side and folders on the other."""
        folders = [path for path in self.folders if os.path.lexists(old / path)]
        found = [f"'{path}' is a file there" for path in folders if not (old / path).is_dir()]
        return sorted(found) + [
            f"'{path}' is a folder there" for path in self.files if is_folder(old / path)
        ]


def name_test(owned: Owned) -> Callable[[str], bool]:
    """One predicate on file names from a predicate or from names and globs (case matters)."""
    if callable(owned):
        return owned
    patterns = (owned,) if isinstance(owned, str) else tuple(owned)
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def carry(old: Path, new: Path, written: Written, is_owned: Callable[[str], bool]) -> None:
    """Give `new` every entry of `old` that it lacks, without copying data where links work.

    Files become hard links, symlinks are made again, folders are rebuilt with their mode. Where
    the writer wrote (`written.folders`), names with `is_owned` are left out; a folder that only
    `old` has comes over whole. An entry of `new` is never touched.

    Raises:
        PinnedError: something is mounted inside `old`, which therefore must stay where it is.
        OSError: an entry can be neither linked nor copied.
    """
    _carry_folder(old, new, Path(), written, is_owned)


def _carry_folder(
    old: Path, new: Path, inside: Path, written: Written, is_owned: Callable[[str], bool]
) -> None:
    writers = inside in written.folders
    with os.scandir(old / inside) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        if writers and is_owned(name):
            continue
        source, goal = old / inside / name, new / inside / name
        # Others may be deleting from the old directory, a trainer its oldest checkpoint.
        with _unless_gone(source):
            if not is_folder(source):
                _carry_file(source, goal)
                continue
            fresh = not os.path.lexists(goal)
            if fresh:
                os.mkdir(goal)
            if is_folder(goal):
                _carry_folder(old, new, inside / name, written, is_owned)
            if fresh:
                take_mode(source, goal)


@contextmanager
def _unless_gone(source: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        if os.path.lexists(source):
            raise


def _carry_file(old: Path, new: Path) -> None:
    if os.path.lexists(new):
        return
    if old.is_symlink():
        os.symlink(os.readlink(old), new, target_is_directory=old.is_dir())
        return
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise PinnedError(error.errno, "a filesystem is mounted here", str(old)) from error
        if error.errno in _FATAL or not S_ISREG(os.lstat(old).st_mode):
            raise
        shutil.copy2(old, new)
        sync_file(new)


def take_mode(old: Path, new: Path) -> None:
    """Give `new` the permissions of `old`, and its owner as far as that is permitted."""
    status = old.stat()
    if sys.platform != "win32":
        with suppress(OSError):
            os.chown(new, status.st_uid, status.st_gid)
    os.chmod(new, S_IMODE(status.st_mode))


def sync_file(file: Path) -> None:
    """Return when the content of a regular file is on the disk; links need nothing."""
    if file.is_symlink():
        return
    _sync(file, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Return when the names in `folder` are on the disk, where the system can promise that."""
    if sys.platform == "win32":
        return
    try:
        _sync(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def sync_folders(root: Path) -> None:
    """`sync_folder` for `root` and every folder below it."""
    for here, _, _ in os.walk(root):
        sync_folder(Path(here))


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        if sys.platform == "darwin":
            # There fsync leaves the data in the drive's own cache.
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()
