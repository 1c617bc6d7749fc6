"""kill -9 at any instant leaves the old version or the new one, and nothing in the way."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable

import pytest

from tests.torture.amounts import amount, each
from tests.torture.cases import ABSENT, CASES
from tests.torture.figures import Figures
from tests.torture.frame import Bench

Benches = Callable[[str], Bench]

MIXTURE = "mixture"
# A kill in every one of this many bytes of a file that is written.
PAGE = 4096


def see(bench: Bench, expected: set[str], mixtures: list[str]) -> str:
    """What a reader finds after a kill."""
    try:
        found = bench.case.read(bench.work)
        assert found in expected, f"{found}, not one of {expected}"
        if found != ABSENT:
            bench.case.check_beside(bench.work)
    except Exception as error:
        mixtures.append(f"{type(error).__name__}: {error}")
        return MIXTURE
    return found


def settle(bench: Bench) -> None:
    """The next save goes through and sweeps away what the dead ones left."""
    bench.write()
    bench.case.check_beside(bench.work)
    assert bench.hidden() == []


@pytest.mark.parametrize("name", CASES)
def test_at_random_instants(name: str, benches: Benches, figures: Figures) -> None:
    bench = benches(name)
    inputs = bench.case.inputs(bench.work)
    longest = bench.seconds()
    kills = amount(full=200, short=4)
    moments = random.Random(0)
    mixtures: list[str] = []
    seen = {"old": 0, "new": 0}
    with figures.timed("kills", what=bench.case.told, kills=kills) as row:
        turn = misses = 0
        while turn < kills:
            before, number = bench.case.read(bench.work), bench.next()
            child = bench.child(number)
            child.go()
            # The instants are spread over the whole of it, in a mixed order.
            share = ((turn * 89) % kills + moments.random()) / kills
            time.sleep(share * longest)
            child.kill()
            end = child.wait()
            assert end is not None
            if end.signal is None:
                misses += 1
                longest *= 0.97
                assert misses < 3 * kills + 20
                continue
            turn += 1
            found = see(bench, {before, bench.case.label(number)}, mixtures)
            if found == MIXTURE:
                break
            seen["old" if found == before else "new"] += 1
        row.update(seen, mixtures=len(mixtures))
    assert mixtures == []
    assert bench.case.inputs(bench.work) == inputs
    settle(bench)


@pytest.mark.parametrize("first", [False, True], ids=["over", "first"])
@pytest.mark.parametrize("name", amount(full=tuple(CASES), short=("renames", "merge")))
def test_before_every_change_to_the_disk(
    name: str, first: bool, benches: Benches, figures: Figures
) -> None:
    bench = benches(name)
    inputs = bench.case.inputs(bench.work)
    mixtures: list[str] = []
    outcomes = []
    told = bench.case.told + (", first time" if first else "")
    with figures.timed("steps", what=told) as row:
        calls = _calls(bench, first)
        for at in each(calls, short=4):
            before = _begin(bench, first)
            number = bench.next()
            end = bench.run(number, kind="die", at=at)
            assert end.signal is not None, f"{at} of {calls}: {end}"
            found = see(bench, {before, bench.case.label(number)}, mixtures)
            outcomes.append({before: "old", MIXTURE: MIXTURE}.get(found, "new"))
        row.update(kills=len(outcomes), old=outcomes.count("old"), new=outcomes.count("new"))
        row.update(mixtures=len(mixtures))
    assert mixtures == []
    # Once the new one is there it stays.
    assert outcomes == sorted(outcomes, reverse=True)
    assert bench.case.inputs(bench.work) == inputs
    settle(bench)


def _begin(bench: Bench, first: bool) -> str:
    """Leave a version, or nothing, at the place; what `read` says of it."""
    bench.case.forget(bench.work)
    if first:
        shutil.rmtree(bench.work / "out", ignore_errors=True)
        bench.case.beside = ()
    elif bench.case.read(bench.work) == ABSENT:
        bench.write()
    return bench.case.read(bench.work)


def _calls(bench: Bench, first: bool) -> int:
    _begin(bench, first)
    end = bench.run(bench.next())
    assert end.done, end.text
    return end.calls


@pytest.mark.parametrize("name", amount(full=tuple(CASES), short=("dropin", "merge")))
def test_within_every_page_of_a_file(name: str, benches: Benches, figures: Figures) -> None:
    bench = benches(name)
    largest = max(path.stat().st_size for path in (bench.work / "out").rglob("*"))
    pages = range(0, largest, PAGE)
    steps = min(amount(full=200, short=3), len(pages))
    mixtures: list[str] = []
    kills = 0
    with figures.timed("pages", what=bench.case.told) as row:
        for limit in sorted({pages[turn * len(pages) // steps] for turn in range(steps)}):
            before, number = bench.case.read(bench.work), bench.next()
            end = bench.run(number, largest=limit, fatal=True)
            # It dies as the file grows beyond the limit, before anything is published.
            assert end.signal is not None, f"{limit} of {largest}: {end}"
            kills += 1
            see(bench, {before}, mixtures)
        row.update(kills=kills, old=kills - len(mixtures), mixtures=len(mixtures))
    assert mixtures == []
    settle(bench)
