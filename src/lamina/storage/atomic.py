"""Write a directory whole or not at all.

A save fills a hidden directory beside the target, makes it durable, and exchanges the two in one
step, so at any instant the target is the old directory or the new one, complete.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from stat import S_IMODE

from lamina.errors import CheckpointError
from lamina.storage.carry import (
    Owned,
    Written,
    carry,
    name_test,
    sync_file,
    sync_folder,
    sync_folders,
    take_mode,
)
from lamina.storage.disk import disk_faults_reported, is_read_only, reported
from lamina.storage.exchange import PinnedError, swap_in
from lamina.storage.inplace import replace_in_place
from lamina.storage.mounts import mounts_within
from lamina.storage.staging import (
    check_free,
    held,
    hidden_siblings,
    remove_tree,
    staging_directory,
    sweep,
    turn,
)

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model-*.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "adapter_model-*.bin",
    "adapter_model.bin.index.json",
)

# How long a reader gives a living save to finish its two renames, and a save others to begin.
_PATIENCE_S = 2.0


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, owned: Owned = ADAPTER_FILES
) -> Iterator[Path]:
    """Yield an empty staging directory that becomes the directory `path` at a clean end.

    A crash or power loss at any instant leaves the old directory or the new one. An exception
    inside leaves the old one untouched. What the old directory has and the new one lacks
    (checkpoints, tokenizer files, links) comes over as hard links, without being copied.

    A directory that can't be moved (the working directory or one above it, a mount point) gets
    its files replaced one by one instead, weights first and `adapter_config.json` last: there a
    crash can leave files of both. Where the system has no exchange of directories, a crash can
    leave none at `path`, and `recover` puts the old one back.

    Args:
        path: the directory to write; parents are made, a link is followed.
        owned: names or globs (or a predicate on a name) that belong to the writer: an old entry
            so named is dropped if the new directory doesn't bring it. Holds for the folders that
            the writer made, not for others such as `checkpoint-10/`.

    Of two saves of one directory at the same time the one that began first goes on. Where the
    filesystem has no locks nothing can tell that there are two, and the last to end wins.

    Raises:
        CheckpointError: before anything is written, when `path` is a file, is below one or isn't
            writable; at the end, when a file would take a folder's place; when the disk is full
            or fails.
        DirectoryInUseError: before anything is written, when another save of `path` goes on.
    """
    target = _resolved(path)
    with ExitStack() as stack:
        with reported(target):
            check_writable(target)
            stack.enter_context(_parents(target))
            with turn(target, _PATIENCE_S):
                sweep(target)
                staging = stack.enter_context(staging_directory(target, _staging_folder(target)))
                # Two that got here without taking turns see each other.
                sweep(target, own=staging)
        with disk_faults_reported(target):
            yield staging
        with reported(target), turn(target):
            # Another save may have died since this one began.
            recover(target)
            _publish(staging, target, owned)


def recover(path: str | os.PathLike[str]) -> bool:
    """Put back the directory that a crash between two renames left hidden; True if it did.

    Call it before reading `path`. It does nothing where `path` exists, and waits a moment for a
    save that is still alive.

    Raises:
        CheckpointError: the directory is there under its hidden name and can't be renamed.
    """
    target = _resolved(path)
    deadline = time.monotonic() + _PATIENCE_S
    while not os.path.lexists(target):
        asides = hidden_siblings(target, "old")
        if not asides:
            return False
        with held(asides[-1]) as ours:
            if ours is not False or time.monotonic() > deadline:
                return _put_back(asides[-1], target)
        time.sleep(0.01)
    return False


def _put_back(aside: Path, target: Path) -> bool:
    try:
        os.rename(aside, target)
    except OSError as error:
        # The save, or another reader, was faster.
        if os.path.lexists(target):
            return False
        raise CheckpointError(
            f"A save of '{target}' was cut off; what was there lies in '{aside}' and can't be "
            f"put back ({error.strerror}).",
            cure=f"mv '{aside}' '{target}'",
        ) from error
    return True


def _publish(staging: Path, target: Path, owned: Owned) -> None:
    """Make the staging durable and then the target."""
    is_owned = name_test(owned)
    written = Written.survey(staging)
    clashes = written.clashes(target)
    if clashes:
        raise CheckpointError(
            f"Can't save over '{target}': files would take the place of folders.",
            faults=clashes,
            cure="save to another directory, or move these away",
        )
    readable = staging.stat().st_mode & 0o666
    for file in written.files:
        # Some writers make files for their owner only; a fresh folder's mode follows the umask.
        _let_read(staging / file, readable)
        sync_file(staging / file)
    if staging.parent == target or _is_pinned(target):
        replace_in_place(staging, target, written, is_owned)
        return
    try:
        with held(target):
            if target.is_dir():
                carry(target, staging, written, is_owned)
                take_mode(target, staging)
            sync_folders(staging)
            old = _swap_for_good(staging, target)
            if old is not None:
                # What others added to the old directory while its entries were carried over.
                with suppress(OSError):
                    carry(old, target, written, is_owned)
                remove_tree(old)
    except PinnedError:
        replace_in_place(staging, target, written, is_owned)


def _swap_for_good(staging: Path, target: Path) -> Path | None:
    """Swap the new directory in, durably or not at all; returns where the old one lies now."""
    old = swap_in(staging, target)
    try:
        sync_folder(target.parent)
    except OSError:
        if old is None:
            os.rename(target, staging)
        else:
            remove_tree(swap_in(old, target) or staging)
        raise
    return old


def _let_read(file: Path, mode: int) -> None:
    with suppress(OSError):
        file.chmod(S_IMODE(file.stat().st_mode) | mode)


def _resolved(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Ask, before long work, whether a directory may be written at `path`.

    Raises:
        CheckpointError: it is a file, is below one, or the system forbids it.
        DirectoryInUseError: another save of it goes on.
    """
    target = _resolved(path)
    if os.path.lexists(target) and not target.is_dir():
        raise CheckpointError(
            f"'{target}' is a file; an adapter is saved as a directory.",
            cure=f"save to another directory, such as '{target.with_suffix('')}-adapter'",
        )
    ground = target
    while not os.path.lexists(ground):
        ground = ground.parent
    if not ground.is_dir():
        raise CheckpointError(
            f"Can't make '{target}': '{ground}' is a file.", cure="save to another directory"
        )
    if not os.access(ground, os.W_OK | os.X_OK):
        if is_read_only(ground):
            raise CheckpointError(
                f"Can't write to '{ground}', so not to '{target}' either: the filesystem is "
                "mounted read-only.",
                cure="save to another directory",
            )
        raise CheckpointError(
            f"Can't write to '{ground}', so not to '{target}' either: permission denied.",
            cure=f"save to another directory, or chmod u+w '{ground}'",
        )
    check_free(target)


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make what is missing above the target, and take it away again if nothing comes of it."""
    made: list[Path] = []
    folder = target.parent
    while not folder.is_dir():
        made.append(folder)
        folder = folder.parent
    try:
        os.makedirs(target.parent, exist_ok=True)
        for folder in made:
            sync_folder(folder.parent)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                os.rmdir(folder)
        raise


def _staging_folder(target: Path) -> Path:
    """Where to write: beside the target, or inside where beside isn't the same filesystem."""
    if not target.is_dir():
        return target.parent
    beside = os.access(target.parent, os.W_OK | os.X_OK) and target not in mounts_within(target)
    return target.parent if beside else target


def _is_pinned(target: Path) -> bool:
    """Whether moving `target` would take the working directory or a mounted filesystem along."""
    if not target.is_dir():
        return False
    try:
        here = Path(os.path.realpath(os.getcwd()))
    except FileNotFoundError:
        return bool(mounts_within(target))
    above = any(os.path.samefile(folder, target) for folder in (here, *here.parents))
    return above or bool(mounts_within(target))
