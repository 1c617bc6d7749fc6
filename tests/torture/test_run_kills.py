"""A run that is killed, stopped or out of room at any instant ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import RunError
from lamina.training.run.status import status_of
from tests.torture.amounts import FULL, amount
from tests.torture.disk import Disk
from tests.torture.figures import Figures
from tests.torture.frame import Bench, End, Server
from tests.torture.whole_run import NAME, WholeRun, end_of, phase_of

SEED = int(os.environ.get("LAMINA_SEED", "0"))
# Room that is left on a full disk: a checkpoint takes about 25.
PAGES = (0, 3, 8, 16)


@dataclass
class Runs:
    """Runs of one plan, each in a directory of its own."""

    bench: Bench
    undisturbed: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    calls: int = 0

    @property
    def work(self) -> Path:
        return self.bench.work

    def out(self, number: int) -> Path:
        return self.work / f"out-{number}"

    def new(self) -> int:
        self.bench.number += 1
        return self.bench.number

    def without_a_fault(self) -> None:
        """What a run comes to, and how long it takes, when nothing happens to it."""
        # In the server itself, so that whatever is imported late is there for the children.
        self.bench.server.ask("act", str(self.work), self.new())
        number = self.new()
        began = time.perf_counter()
        end = self.bench.run(number)
        self.seconds = time.perf_counter() - began
        assert end.done, end.trace
        self.undisturbed, self.calls = end_of(self.out(number)), end.calls

    def signalled(self, number: int, after: float, *signals: int) -> End:
        """A run that gets signals after so many seconds, one after the other."""
        child = self.bench.child(number)
        child.go()
        time.sleep(after)
        for each in signals:
            child.signal(each)
            time.sleep(0.01)
        end = child.wait()
        assert end is not None
        return end

    def killed(self, number: int, after: float) -> str:
        """What a run was at when it was killed; "" if it had ended before."""
        end = self.signalled(number, after, signal.SIGKILL)
        if end.signal is None:
            assert end.done, end.trace
            return ""
        assert end.signal == signal.SIGKILL
        self.look(number)
        return phase_of(self.work, number)

    def look(self, number: int) -> None:
        """Whatever lies there, it can be told how far it is."""
        try:
            assert status_of(self.out(number)).running is False
        except RunError as error:
            assert "There is no run" in str(error)

    def finish(self, number: int) -> None:
        """The same command once more comes to the undisturbed end."""
        end = self.bench.run(number)
        assert end.done, end.trace
        self.check(number)

    def check(self, number: int) -> None:
        found = end_of(self.out(number))
        assert found.keys() == self.undisturbed.keys()
        for name, content in found.items():
            assert content == self.undisturbed[name], name


@pytest.fixture(scope="module")
def runs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    print(f"LAMINA_SEED={SEED}")
    work = tmp_path_factory.mktemp("runs")
    server.ask("prepare", NAME, str(work))
    made = Runs(Bench(server, WholeRun(), work))
    made.without_a_fault()
    return made


def told(found: Counter[str]) -> dict[str, Any]:
    """Kills, and what the runs were at."""
    return {"kills": found.total(), "during": dict(found.most_common())}


def test_killed_once(runs: Runs, figures: Figures) -> None:
    draw, found = random.Random(SEED), Counter[str]()
    count = amount(full=20, short=2)
    with figures.timed("runs", what=f"{count} runs, each killed once", seed=SEED) as row:
        while found.total() < count:
            number = runs.new()
            # Spread over the whole of it, in a mixed order.
            share = ((found.total() * 7) % count + draw.random()) / count
            phase = runs.killed(number, share * runs.seconds)
            if phase:
                found[phase] += 1
                runs.finish(number)
            else:
                runs.seconds *= 0.97
        row.update(told(found), same=count)


def test_killed_again_and_again(runs: Runs, figures: Figures) -> None:
    draw, found = random.Random(SEED + 1), Counter[str]()
    count = amount(full=20, short=2)
    number = runs.new()
    with figures.timed("runs", what="one run, killed over and over", seed=SEED + 1) as row:
        while found.total() < count:
            phase = runs.killed(number, draw.uniform(0, runs.seconds))
            if phase:
                found[phase] += 1
            else:
                runs.check(number)
                number = runs.new()
        runs.finish(number)
        row.update(told(found))


@pytest.mark.skipif(not FULL, reason="takes minutes")
def test_killed_before_changes_to_the_disk(runs: Runs, figures: Figures) -> None:
    found = Counter[str]()
    moments = range(1, runs.calls + 1, max(1, runs.calls // 25))
    with figures.timed("runs", what="runs, each killed before a change to the disk") as row:
        for at in moments:
            number = runs.new()
            end = runs.bench.run(number, kind="die", at=at)
            assert end.signal == signal.SIGKILL
            found[phase_of(runs.work, number)] += 1
            runs.look(number)
            runs.finish(number)
        row.update(told(found), same=len(moments))


@pytest.mark.skipif(not FULL, reason="takes minutes")
def test_the_whole_command_killed(runs: Runs, figures: Figures) -> None:
    """From the start of the interpreter, under another order of hashes each time."""
    draw, found = random.Random(SEED + 2), Counter[str]()
    count = 6
    number = runs.new()
    began = time.perf_counter()
    assert command(runs, number).wait() == 0
    took = time.perf_counter() - began
    runs.check(number)
    with figures.timed("runs", what="`lamina run`, from its start", seed=SEED + 2) as row:
        for turn in range(count):
            number = runs.new()
            process = command(runs, number)
            time.sleep((turn + draw.random()) / count * took)
            process.kill()
            if process.wait() == 0:
                continue
            at = "importing" if not runs.out(number).exists() else "the run itself"
            found[at] += 1
            assert command(runs, number).wait() == 0
            assert (runs.out(number) / "report" / "index.html").is_file()
            runs.check(number)
        row.update(told(found), same=found.total())


def command(runs: Runs, number: int) -> subprocess.Popen[bytes]:
    """`lamina run` itself."""
    plan, out = runs.work / "plan.yaml", runs.out(number)
    words = [sys.executable, "-m", "lamina", "run", str(plan), f"output_dir={out}", "--json"]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "signals",
    amount(full=((signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)), short=((signal.SIGTERM,),)),
    ids=lambda signals: " and ".join(each.name for each in signals),
)
def test_asked_to_stop(signals: tuple[signal.Signals, ...], runs: Runs, figures: Figures) -> None:
    """It ends by itself, with all that it needs to go on."""
    draw, found = random.Random(SEED + 3), Counter[str]()
    what = " and ".join(each.name for each in signals)
    count = amount(full=10, short=1)
    with figures.timed("runs", what=f"runs that got {what}", seed=SEED + 3) as row:
        for turn in range(count):
            number = runs.new()
            after = (turn + draw.random()) / count * runs.seconds
            end = runs.signalled(number, after, *signals)
            # Before the run listens, the signal does what it does to every process.
            assert end.signal in {None, *signals}
            assert end.error in {None, "Interrupted", "KeyboardInterrupt"}, end.trace
            found["the end" if end.done else phase_of(runs.work, number)] += 1
            runs.look(number)
            runs.finish(number)
        row.update(stopped=count - found["the end"], during=dict(found.most_common()), same=count)


def check_full(end: End, out: Path) -> None:
    """One error that says what is the matter, and what to do."""
    assert end.error in {"RunError", "CheckpointError"}, end.trace
    assert "No space left" in end.text, end.text
    assert str(out) in end.text, end.text
    assert "To mend it: " in end.text
    # Whatever got onto the disk of it can be read.
    json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else None


def test_no_room_at_a_change_to_the_disk(runs: Runs, figures: Figures) -> None:
    found = Counter[str]()
    moments = range(runs.calls // 3, runs.calls, max(1, runs.calls // amount(full=30, short=60)))
    with figures.timed("full disk in a run", what="ENOSPC, injected") as row:
        for at in moments:
            if found["refused"] and not FULL:
                break
            number = runs.new()
            end = runs.bench.run(number, kind="fail", errno="ENOSPC", at=at)
            if end.done:
                # It met what only tidies up.
                found["harmless"] += 1
                runs.check(number)
                continue
            found["refused"] += 1
            check_full(end, runs.out(number))
            runs.finish(number)
        row.update(found)
    assert found["refused"]


@pytest.mark.skipif(not FULL, reason="takes minutes")
def test_a_disk_that_fills_up(disk: Disk, server: Server, figures: Figures) -> None:
    """Something else takes all room, or all but a little, while a run is going on."""
    work = disk.path / "work"
    server.ask("prepare", NAME, str(work))
    runs = Runs(Bench(server, WholeRun(), work))
    runs.without_a_fault()
    draw, found = random.Random(SEED + 4), Counter[str]()
    with figures.timed("full disk in a run", what="a disk that fills up") as row:
        for turn in range(10):
            number = runs.new()
            child = runs.bench.child(number)
            child.go()
            # A run that hasn't begun looks itself whether there is room.
            while phase_of(work, number) in {"importing", "reading the plan"}:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.6) * runs.seconds)
            disk.leave(PAGES[turn % len(PAGES)])
            end = child.wait()
            disk.free()
            assert end is not None
            found["in time" if end.done else "refused"] += 1
            if not end.done:
                check_full(end, runs.out(number))
            runs.finish(number)
        row.update(found)
    assert found["refused"]
