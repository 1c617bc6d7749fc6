"""The client of the server: acts, each in a child of its own, interrupted as a test wants."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lamina
from tests.torture.cases import ABSENT, CASES, Case

HERE = Path(__file__).parent


@dataclass(frozen=True)
class End:
    """How a child ended.

    Attributes:
        signal: that killed it; None if it came to its end.
        error: the class of the exception that came out of the act.
        text: its message.
        calls: how often it changed the disk.
        trace: where the exception came from.
    """

    signal: int | None
    error: str | None = None
    text: str = ""
    calls: int = 0
    trace: str = ""

    @property
    def done(self) -> bool:
        """Whether the act was done without an error."""
        return self.signal is None and self.error is None


@dataclass
class Child:
    """A process that is about to act, stopped."""

    server: Server
    pid: int
    told: Path

    def go(self) -> None:
        """Let it run."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> End | None:
        """Its end; None if it stopped itself."""
        status = self.server.ask("wait", self.pid)
        if status["stopped"]:
            return None
        told = self.told.read_text()
        return End(signal=status["signal"], **(json.loads(told) if told else {}))


@dataclass
class Bench:
    """A case with a directory to work in."""

    server: Server
    case: Case
    work: Path
    number: int = 0
    started: int = field(default=0)

    def child(self, number: int, work: Path | None = None, **fate: Any) -> Child:
        """A child that will write a version."""
        self.started += 1
        told = self.server.notes / f"{self.work.name}-{self.started}.json"
        where = self.work if work is None else work
        return Child(
            self.server, self.server.ask("start", str(where), number, fate, str(told)), told
        )

    def run(self, number: int, **fate: Any) -> End:
        """Let a child write a version, to its end."""
        child = self.child(number, **fate)
        child.go()
        end = child.wait()
        assert end is not None
        return end

    def with_others(self) -> Bench:
        """Itself, with a version in place and other files beside it."""
        self.case.forget(self.work)
        if self.case.read(self.work) == ABSENT:
            self.write()
        self.case.lay_beside(self.work)
        return self

    def next(self) -> int:
        """A version that is not the one that is there."""
        here = self.case.read(self.work)
        self.number += 1
        while self.case.label(self.number) == here:
            self.number += 1
        return self.number

    def write(self) -> str:
        """Write a new version without a fault; its label."""
        number = self.next()
        end = self.run(number)
        assert end.done, end.text
        assert self.case.read(self.work) == self.case.label(number)
        return self.case.label(number)

    def seconds(self) -> float:
        """How long an act takes: the median of three."""
        taken = []
        for _ in range(3):
            child = self.child(self.next())
            began = time.perf_counter()
            child.go()
            end = child.wait()
            taken.append(time.perf_counter() - began)
            assert end is not None
            assert end.done, end.text
        return sorted(taken)[1]

    def hidden(self) -> list[str]:
        """What a save left beside the directory, under a hidden name."""
        return sorted(p.name for p in self.work.iterdir() if p.name.startswith("."))


class Server:
    """The process that forks the children."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes
        paths = (HERE.parents[1], Path(lamina.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        )

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the server."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([name, *arguments]), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert "failed" not in answer, answer["failed"]
        return answer["value"]

    def bench(self, name: str, work: Path) -> Bench:
        """A case that is prepared and has been written once, with other files beside it."""
        work.mkdir(parents=True, exist_ok=True)
        self.ask("prepare", name, str(work))
        bench = Bench(self, CASES[name](), work, number=1)
        # In the server itself, so that whatever is imported late is there for the children.
        self.ask("act", str(work), bench.number)
        assert bench.case.read(work) == bench.case.label(bench.number)
        return bench.with_others()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()
