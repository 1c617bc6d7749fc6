"""Put a finished directory in an old one's place: one step where the system has it, else two."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lamina.storage.staging import hidden_sibling

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAME_SWAP = 2
# C libraries without a renameat2 of their own still have syscall().
_RENAMEAT2 = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "ppc64le": 357, "s390x": 347}

_NO_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
# A mount point, a layer of a container's image, another user's directory in a sticky one,
# on Windows a directory with an open file.
_PINNED = frozenset({errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM})
_OCCUPIED = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})


class PinnedError(OSError):
    """The directory can't be moved from where it is, only its files can be replaced."""


def exchange(one: Path, other: Path) -> None:
    """Swap what two paths of one filesystem name, in one step that no crash can split.

    Raises:
        OSError: with ENOSYS, EINVAL or ENOTSUP where the system or filesystem has no such step;
            with EBUSY or EXDEV for a mount point.
    Source: renameat2(2) with RENAME_EXCHANGE on Linux, renamex_np(2) with RENAME_SWAP on macOS.
    """
    libc = _libc() if sys.platform in ("linux", "darwin") else None
    swap = _swap_call(libc) if libc is not None else None
    if swap is None:
        raise OSError(errno.ENOSYS, "no exchange of directories on this system", str(one))
    if swap(os.fsencode(one), os.fsencode(other)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def swap_in(staging: Path, target: Path) -> Path | None:
    """Make `staging` the directory `target`; returns where the old one lies now, None if none.

    Raises:
        PinnedError: `target` can't be moved; both are as they were.
        OSError: anything else; both are as they were.
    """
    if not os.path.lexists(target) and _moved_to_free_place(staging, target):
        return None
    try:
        exchange(staging, target)
        return staging
    except FileNotFoundError:
        os.rename(staging, target)
        return None
    except OSError as error:
        # Some container runtimes forbid the call itself: only a plain rename tells what is pinned.
        if error.errno not in _NO_EXCHANGE | _PINNED:
            raise
    return _swap_by_two_renames(staging, target)


def _moved_to_free_place(staging: Path, target: Path) -> bool:
    try:
        os.rename(staging, target)
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
        return False
    return True


def _swap_by_two_renames(staging: Path, target: Path, attempts: int = 20) -> Path:
    """Move the old directory aside and the new one in; between the two, `recover` is needed."""
    aside = hidden_sibling(target, "old")
    while True:
        try:
            os.rename(target, aside)
        except OSError as error:
            if error.errno in _PINNED:
                raise PinnedError(error.errno, error.strerror, str(target)) from error
            raise
        try:
            os.rename(staging, target)
            return aside
        except BaseException as error:
            attempts -= 1
            # A reader saw no directory and put the old one back: aside is gone, so once more.
            put_back = isinstance(error, OSError) and not os.path.lexists(aside)
            if put_back and attempts > 0:
                continue
            with suppress(FileNotFoundError):
                os.rename(aside, target)
            raise


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None, use_errno=True)
    except OSError:
        return None


def _swap_call(libc: ctypes.CDLL) -> Callable[[bytes, bytes], int] | None:
    """The C library's exchange of two paths, whatever its name; None where there is none."""
    two_paths = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if sys.platform == "darwin":
        if not hasattr(libc, "renamex_np"):
            return None
        libc.renamex_np.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
        return lambda a, b: int(libc.renamex_np(a, b, _RENAME_SWAP))
    if hasattr(libc, "renameat2"):
        libc.renameat2.argtypes = two_paths
        return lambda a, b: int(libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE))
    number = _RENAMEAT2.get(platform.machine())
    if number is None or not hasattr(libc, "syscall"):
        return None
    libc.syscall.argtypes = (ctypes.c_long, *two_paths)
    return lambda a, b: int(libc.syscall(number, _AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE))
