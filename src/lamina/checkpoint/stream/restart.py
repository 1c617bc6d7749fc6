"""The files of a merge that isn't finished, kept over a kill.

They lie in a hidden directory beside the result, with a manifest: what the merge is of, and which
files are finished. A file is noted as such only when it is on the disk. The same merge goes on
from there; another one begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.errors import DirectoryInUseError
from lamina.storage.carry import sync_file, sync_folder
from lamina.storage.staging import held, in_use, remove_tree

_MANIFEST = "lamina_merge.json"
_DONE = "lamina_merge_done.txt"
_MODEL = "model"
_WRITER = "lamina_merge_writer.json"


@dataclass
class Unfinished:
    """A merge in progress.

    Attributes:
        directory: all that belongs to it.
        sizes: file -> bytes, of those that are to come.
        done: the files that are finished.
        kept: how many of them were finished by a merge that was killed.
    """

    directory: Path
    sizes: Mapping[str, int]
    done: set[str] = field(default_factory=set)
    kept: int = 0

    @property
    def model(self) -> Path:
        """Where the files of the result are."""
        return self.directory / _MODEL

    def finish(self, name: str) -> None:
        """Put a file on the disk, then note that it is there."""
        sync_file(self.model / name)
        sync_folder((self.model / name).parent)
        with (self.directory / _DONE).open("a", encoding="utf-8") as noted:
            noted.write(json.dumps(name) + "\n")
            noted.flush()
            os.fsync(noted.fileno())
        self.done.add(name)

    def keep_only_weights(self) -> None:
        """Forget what a merge that was killed had put beside them."""
        for file in list(self.model.rglob("*")):
            if file.is_file() and str(file.relative_to(self.model)) not in self.sizes:
                file.unlink()

    def hand_over(self, target: Path) -> None:
        """Move the result into a directory that is about to be published."""
        for entry in sorted(self.model.iterdir()):
            shutil.move(entry, target / entry.name)

    def discard(self) -> None:
        """Keep nothing of it: it would come out the same again."""
        remove_tree(self.directory)


def place_of(target: Path) -> Path:
    """Where a merge into `target` keeps what isn't finished."""
    resolved = Path(os.path.realpath(target.expanduser()))
    name = resolved.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return resolved.parent / f".{name}.merging"


@contextmanager
def unfinished(
    target: Path,
    identity: Mapping[str, Any],
    sizes: Mapping[str, int],
    headers: Mapping[str, bytes],
) -> Iterator[Unfinished]:
    """The directory for a merge into `target`; removed at a clean end, else kept.

    Args:
        target: where the result will be.
        identity: what the merge is of; of another one, nothing is kept.
        sizes: file -> bytes.
        headers: file -> its first bytes.

    Raises:
        DirectoryInUseError: another process is at it.
    """
    directory = place_of(target)
    directory.mkdir(parents=True, exist_ok=True)
    with held(directory) as ours:
        if ours is False:
            raise _in_use(target, directory)
        place = Unfinished(directory, sizes, _finished(directory, identity, sizes, headers))
        place.kept = len(place.done)
        if not place.done:
            _begin(directory, identity)
        place.model.mkdir(exist_ok=True)
        writer = {"pid": os.getpid(), "since": time.time()}
        (directory / _WRITER).write_text(json.dumps(writer), encoding="utf-8")
        yield place
        remove_tree(directory)


def check_free(target: Path) -> None:
    """Ask, without changing anything, whether another merge into `target` goes on.

    Raises:
        DirectoryInUseError: it does.
    """
    directory = place_of(target)
    with held(directory) as ours:
        if ours is False:
            raise _in_use(target, directory)


def _in_use(target: Path, directory: Path) -> DirectoryInUseError:
    try:
        writer = json.loads((directory / _WRITER).read_text(encoding="utf-8"))
        return in_use(target, int(writer["pid"]), float(writer["since"]))
    except (OSError, ValueError, TypeError, KeyError):
        # It has just begun.
        return in_use(target, "unknown")


def _begin(directory: Path, identity: Mapping[str, Any]) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
        else:
            entry.unlink()
    (directory / _MANIFEST).write_text(json.dumps(identity, sort_keys=True), encoding="utf-8")
    sync_file(directory / _MANIFEST)
    sync_folder(directory)


def _finished(
    directory: Path,
    identity: Mapping[str, Any],
    sizes: Mapping[str, int],
    headers: Mapping[str, bytes],
) -> set[str]:
    """The files of this very merge that are finished, as far as they look it."""
    with suppress(OSError, ValueError):
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        if manifest != json.loads(json.dumps(identity)):
            return set()
        lines = (directory / _DONE).read_text(encoding="utf-8").splitlines()
        return {
            name
            for name in sizes
            if json.dumps(name) in lines
            and _looks_it(directory / _MODEL / name, sizes[name], headers[name])
        }
    return set()


def _looks_it(path: Path, size: int, header: bytes) -> bool:
    try:
        with path.open("rb") as opened:
            return path.stat().st_size == size and opened.read(len(header)) == header
    except OSError:
        return False
