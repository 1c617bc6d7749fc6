"""A full disk: one clear error, the old directory intact, and a second try when there is room."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.torture.amounts import amount, each
from tests.torture.cases import CASES
from tests.torture.disk import PAGE, Disk
from tests.torture.figures import Figures
from tests.torture.frame import Bench, End, Server

FULL = "No space left"


def check_refused(bench: Bench, end: End, before: str, told: str) -> None:
    """One clear error, and all as it was."""
    assert end.error == "CheckpointError", end.trace
    # A merge looks first whether there is room.
    assert told in end.text or (told == FULL and "is too small" in end.text), end.text
    assert str(bench.work) in end.text
    assert "To mend it: " in end.text
    assert bench.case.read(bench.work) == before
    bench.case.check_beside(bench.work)
    # What a merge has finished is kept for the next try.
    assert [name for name in bench.hidden() if name != ".out.merging"] == []


def check_second_try(bench: Bench, number: int) -> None:
    end = bench.run(number)
    assert end.done, end.text
    assert bench.case.read(bench.work) == bench.case.label(number)
    bench.case.check_beside(bench.work)
    assert bench.hidden() == []


def fill_up(bench: Bench, disk: Disk, leave: Callable[[int], None], step: int) -> int:
    """Try with more and more room, until there is enough; how often there wasn't."""
    for points, room in enumerate(range(0, 100_000, step)):
        bench.case.forget(bench.work)
        before, number = bench.case.read(bench.work), bench.next()
        leave(room)
        end = bench.run(number)
        disk.free()
        if end.done:
            assert bench.case.read(bench.work) == bench.case.label(number)
            return points
        check_refused(bench, end, before, FULL)
    raise AssertionError("it never was enough")


@pytest.mark.parametrize("name", amount(full=tuple(CASES), short=("stage", "merge")))
def test_a_small_disk(name: str, disk: Disk, server: Server, figures: Figures) -> None:
    bench = server.bench(name, disk.path / "work")
    size = sum(path.stat().st_size for path in (bench.work / "out").rglob("*") if path.is_file())
    with figures.timed("full disk", what=bench.case.told) as row:
        step = max(1, size // PAGE // amount(full=100, short=3))
        row["sizes"] = fill_up(bench, disk, disk.leave, step)
        row["counts of files"] = fill_up(bench, disk, disk.leave_files, amount(1, 3))
        assert row["sizes"] > 1
        assert row["counts of files"] > 0
    # The same act succeeds at the second try, from what a failed first one has left.
    number = bench.next()
    disk.leave(size // PAGE // 2)
    assert bench.run(number).error == "CheckpointError"
    disk.free()
    check_second_try(bench, number)


@pytest.mark.parametrize("error", amount(full=("ENOSPC", "EDQUOT", "EIO"), short=("ENOSPC",)))
@pytest.mark.parametrize("name", amount(full=tuple(CASES), short=("renames", "dropin", "merge")))
def test_an_error_at_every_change_to_the_disk(
    name: str, error: str, benches: Callable[[str], Bench], figures: Figures
) -> None:
    bench = benches(name)
    end = bench.run(bench.next())
    assert end.done
    refused = harmless = 0
    told = "Input/output error" if error == "EIO" else FULL
    with figures.timed("errors", what=bench.case.told, error=error) as row:
        for at in each(end.calls, short=3):
            bench.case.forget(bench.work)
            before, number = bench.case.read(bench.work), bench.next()
            end = bench.run(number, kind="fail", errno=error, at=at)
            if end.done:
                # It met what only tidies up.
                harmless += 1
                assert bench.case.read(bench.work) == bench.case.label(number)
                continue
            refused += 1
            check_refused(bench, end, before, told)
        row.update(refused=refused, harmless=harmless)
    assert refused > 0
    check_second_try(bench, bench.next())


@pytest.mark.parametrize("name", amount(full=tuple(CASES), short=("pretrained", "merge")))
def test_a_limit_on_the_size_of_files(
    name: str, benches: Callable[[str], Bench], figures: Figures
) -> None:
    bench = benches(name)
    largest = max(path.stat().st_size for path in (bench.work / "out").rglob("*"))
    limits = range(0, largest, max(PAGE, largest // amount(full=50, short=2)))
    with figures.timed("file size limits", what=bench.case.told, limits=len(limits)):
        for limit in limits:
            before = bench.case.read(bench.work)
            end = bench.run(bench.next(), largest=limit)
            check_refused(bench, end, before, "File too large")
    check_second_try(bench, bench.next())
