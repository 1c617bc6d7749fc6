"""Has workers read many mutants, outlives those that die, and counts what became of them.

python -m tests.torture.fuzz_run NUMBER...    reads these again, and tells what goes wrong
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
# A worker has limits of its own; this is for what its signals can't end.
_SILENT_SECONDS = 300.0


@dataclass
class Result:
    """What became of all mutants.

    Attributes:
        mutants: how many were read.
        outcomes: name of an error's class, or "right" -> how often.
        by_mutator: mutator -> the same.
        failures: a line for each thing that must not be.
        seconds: the most CPU time that one reader took for one mutant.
        peak: bytes of memory of the worker that had most.
        risen: the most that one mutant added to them.
    """

    mutants: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    by_mutator: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak: int = 0
    risen: int = 0

    def add(self, told: dict[str, Any]) -> None:
        """Count one mutant, as a worker tells of it."""
        self.mutants += 1
        self.peak, self.risen = max(self.peak, told["peak"]), max(self.risen, told["memory"])
        name = told["mutators"][0] if told["mutators"] else "nothing"
        for each in told["outcomes"]:
            self.outcomes[each["result"]] += 1
            self.by_mutator.setdefault(name, Counter())[each["result"]] += 1
            self.seconds = max(self.seconds, each["seconds"])
            if each["failure"]:
                self.failures.append(
                    f"case {told['number']} ({told['kind']}: {told['told']}), {each['consumer']}: "
                    f"{each['result']}: {each['failure']}"
                )

    def merge(self, other: Result) -> None:
        """Count what another one has counted."""
        self.mutants += other.mutants
        self.outcomes += other.outcomes
        for name, counts in other.by_mutator.items():
            self.by_mutator[name] = self.by_mutator.get(name, Counter()) + counts
        self.failures += other.failures
        self.seconds = max(self.seconds, other.seconds)
        self.peak, self.risen = max(self.peak, other.peak), max(self.risen, other.risen)


def run(numbers: Sequence[int], folder: Path, workers: int = 1) -> Result:
    """Make the corpus in a folder, and read the mutants of these numbers there."""
    corpus, place = folder / "corpus", folder / "mutants"
    corpus.mkdir()
    place.mkdir()
    maker = _python(["-m", "tests.torture.fuzz_corpus", str(corpus)], folder)
    maker.communicate()
    if maker.returncode:
        raise RuntimeError(f"the corpus can't be made: {_said(folder)}")
    shares = [list(numbers[start::workers]) for start in range(workers)]
    result = Result()
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(lambda share: _read_all(share, corpus, place, folder), shares):
            result.merge(found)
    return result


def _read_all(numbers: list[int], corpus: Path, place: Path, folder: Path) -> Result:
    result = Result()
    while numbers:
        worker = _python(
            ["-m", "tests.torture.fuzz_worker", str(corpus), str(place), *map(str, numbers)], folder
        )
        assert worker.stdout is not None
        begun: int | None = None
        done = 0
        for line in _lines(worker.stdout):
            told = json.loads(line)
            if "begin" in told:
                begun = told["begin"]
            else:
                result.add(told)
                done += 1
        worker.kill()
        worker.communicate()
        said = _said(folder)
        if done == len(numbers):
            break
        if begun is None:
            raise RuntimeError(f"a worker didn't begin: {said}")
        result.failures.append(f"case {begun}: the worker died or hung: {said[-500:]}")
        numbers = numbers[numbers.index(begun) + 1 :]
    return result


def _python(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    # Nobody may look for a base on the network; torch has one thread per worker.
    here = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    with (folder / "errors.txt").open("a") as errors:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **here, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )


def _said(folder: Path) -> str:
    """The end of what went to the workers' standard error."""
    return (folder / "errors.txt").read_text(errors="replace")[-2000:]


def _lines(stream: IO[str]) -> Iterator[str]:
    """Whole lines, until the end or until nothing comes any more."""
    left = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(_SILENT_SECONDS):
            new = os.read(stream.fileno(), 1 << 16)
            if not new:
                return
            *lines, left = (left + new).split(b"\n")
            yield from (line.decode() for line in lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        found = run([int(each) for each in sys.argv[1:]], Path(made))
    print("\n".join(found.failures) or f"all right: {dict(found.outcomes)}")
