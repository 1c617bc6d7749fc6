"""Reads mutants one after the other, under limits, and tells of each in a line of JSON.

python -m tests.torture.fuzz_worker CORPUS FOLDER NUMBER...
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# The second is for waiting; a machine that is busy otherwise is slow by the clock too.
CPU_SECONDS, WALL_SECONDS = 5.0, 60.0
MEMORY = 600 * 1024 * 1024
_ADDRESSES = 4 << 30
_NEVER = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link"}
_ALLOWED = ("/dev/", "/proc/self/")


class HangError(BaseException):
    """A consumer ran out of time; a `BaseException`, so that nobody takes it for an error."""


@dataclass
class Outcome:
    """What became of one mutant in one consumer."""

    consumer: str
    result: str
    seconds: float
    failure: str | None = None
    told: list[str] = field(default_factory=list)


def _alarm(number: int, frame: Any) -> None:
    raise HangError("".join(traceback.format_stack(frame)[-4:]))


def _limited(call: Callable[[], None]) -> None:
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        call()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _consume(name: str, call: Callable[[], None]) -> Outcome:
    from lamina.errors import LaminaError
    from tests.torture.fuzz_consumers import WrongError

    before = time.process_time()
    failure = None
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _limited(call)
            result = "right"
        except LaminaError as error:
            result = type(error).__name__
            failure = _bad_message(error)
        except HangError as error:
            result, failure = "hang", str(error)
        except WrongError as error:
            result, failure = "wrong", f"{error} {_last_frames(error.__cause__)}"
        except BaseException as error:
            result = f"{type(error).__module__}.{type(error).__name__}"
            failure = f"{str(error)[:200]} {_last_frames(error)}"
    for each in caught:
        if not issubclass(each.category, UserWarning):
            failure = failure or f"{each.category.__name__}: {each.message} ({each.filename})"
            result = "warning"
    return Outcome(name, result, time.process_time() - before, failure, told)


def _bad_message(error: Exception) -> str | None:
    try:
        size = len(str(error).encode())
    except UnicodeEncodeError:
        return "its message can't be written"
    return f"its message has {size} bytes" if size > 20_000 else None


def _last_frames(error: BaseException | None) -> str:
    if error is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/lamina/" in frame.filename] or list(frames)
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in ours[:-5:-1])


class Watch:
    """Sees, from Python's own audit, what no reader of files has to do.

    Args:
        folder: the only place where something may be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _NEVER:
            self.seen.append(f"{event} {str(arguments)[:100]}")
        elif event == "open":
            if isinstance(arguments[2], int) and arguments[2] & _WRITES:
                self._check(event, arguments[0])
        elif event in _CHANGES and not _is_relative(arguments[-1]):
            self._check(event, arguments[0])

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            place = os.path.abspath(os.fsdecode(path))
            if not place.startswith((self.folder, *_ALLOWED)):
                self.seen.append(f"{event} {place[:200]}")


def _is_relative(folder: Any) -> bool:
    """Whether a name is looked up in a folder that is open, as when a tree is removed."""
    return isinstance(folder, int) and folder >= 0


class _Memory:
    """The peak of this process since it was last asked."""

    def __init__(self) -> None:
        self.base = self._now("VmRSS")

    def reset(self) -> None:
        self.base = self._now("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.base = max(self.base, self.peak())

    def peak(self) -> int:
        try:
            return self._now("VmHWM")
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def risen(self) -> int:
        return self.peak() - self.base

    def _now(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024


def _limit_addresses() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + _ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(corpus: Path, folder: Path, numbers: list[int]) -> None:
    from tests.torture import fuzz_bases, fuzz_consumers
    from tests.torture.fuzz_cases import FIRST_OF_BASE, mutant
    from tests.torture.fuzz_consumers import Subject, expected_answer
    from tests.torture.fuzz_corpus import KINDS

    for kind in KINDS:
        expected_answer(kind, corpus)
    signal.signal(signal.SIGALRM, _alarm)
    signal.signal(signal.SIGPROF, _alarm)
    _limit_addresses()
    memory, watch = _Memory(), Watch(folder.parent)
    for number in numbers:
        print(json.dumps({"begin": number}), flush=True)
        with mutant(number, corpus, folder) as (case, path):
            memory.reset()
            watch.seen.clear()
            subject = Subject(path, case.kind, corpus)
            outcomes = []
            readers = fuzz_bases if number >= FIRST_OF_BASE else fuzz_consumers
            for name, consume in readers.consumers(number):
                outcome = _consume(name, partial(consume, subject))
                if watch.seen:
                    outcome.failure = outcome.failure or f"it does {'; '.join(watch.seen[:3])}"
                    watch.seen.clear()
                outcomes.append(vars(outcome))
                if memory.risen > MEMORY:
                    outcome.failure = outcome.failure or f"{memory.risen >> 20} MiB of memory"
                    outcomes[-1]["failure"] = outcome.failure
                    memory.reset()
            print(
                json.dumps(
                    {
                        "number": number,
                        "kind": case.kind,
                        "mutators": case.mutators,
                        "told": case.told[:300],
                        "outcomes": outcomes,
                        "memory": memory.risen,
                        "peak": memory.peak(),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(each) for each in sys.argv[3:]])
