"""Two processes that write to one directory at once: one wins, the other is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.torture.amounts import amount, each
from tests.torture.cases import CASES
from tests.torture.figures import Figures
from tests.torture.frame import Bench, End

TOLD = "DirectoryInUseError"


def is_told(end: End, pid: int) -> bool:
    """Whether a child ended because another one, if it is known, is at work."""
    if end.done:
        return False
    assert end.error == TOLD, end.trace
    # A merge that has just begun has not yet said whose it is.
    assert f"({pid})" in end.text or "(unknown)" in end.text, end.text
    assert "To mend it: wait" in end.text
    return True


def both(bench: Bench, at: int) -> tuple[bool, bool]:
    """Stop one at a change to the disk, let the other run; (first is done, second is done)."""
    bench.case.forget(bench.work)
    numbers = bench.next(), bench.next()
    first = bench.child(numbers[0], kind="stop", at=at)
    first.go()
    assert first.wait() is None
    second = bench.child(numbers[1], patience=0.05)
    second.go()
    ended = second.wait()
    assert ended is not None
    told = is_told(ended, first.pid)
    first.go()
    end = first.wait()
    assert end is not None
    if not end.done:
        assert not told
        assert is_told(end, second.pid)
    done = [
        bench.case.label(number)
        for number, through in zip(numbers, (end.done, not told), strict=True)
        if through
    ]
    assert bench.case.read(bench.work) in done
    bench.case.check_beside(bench.work)
    return end.done, not told


@pytest.mark.parametrize("name", amount(full=tuple(CASES), short=("renames", "merge")))
def test_at_every_change_to_the_disk(
    name: str, benches: Callable[[str], Bench], figures: Figures
) -> None:
    bench = benches(name)
    end = bench.run(bench.next())
    found = {"told": 0, "one after the other": 0}
    with figures.timed("two writers", what=bench.case.told) as row:
        for at in each(end.calls, short=3):
            one, other = both(bench, at)
            assert one or other
            found["one after the other" if one and other else "told"] += 1
        row.update(found, pairs=sum(found.values()))
    # Only before the first has begun, or after it has published, may they both be done.
    assert found["told"] > 1
    bench.write()
    assert bench.hidden() == []


@pytest.mark.parametrize("name", amount(full=tuple(CASES), short=("directory", "merge")))
def test_at_the_same_time(name: str, benches: Callable[[str], Bench], figures: Figures) -> None:
    bench = benches(name)
    rounds = amount(full=50, short=2)
    told = 0
    with figures.timed("races", what=bench.case.told, rounds=rounds) as row:
        for _ in range(rounds):
            pair = [(number, bench.child(number)) for number in (bench.next(), bench.next())]
            for _, child in pair:
                child.go()
            ends = [child.wait() for _, child in pair]
            done = [number for (number, _), end in zip(pair, ends, strict=True) if end and end.done]
            assert done, ends
            assert bench.case.read(bench.work) in [bench.case.label(number) for number in done]
            bench.case.check_beside(bench.work)
            told += 2 - len(done)
            assert all(end and (end.done or end.error == TOLD) for end in ends), ends
        row.update(told=told)
    assert bench.hidden() == []
