"""A target that can't be written is refused before anything is done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.torture.amounts import amount
from tests.torture.cases import CASES
from tests.torture.disk import Disk
from tests.torture.figures import Figures
from tests.torture.frame import Bench, End, Server

NOBODY = 65534


def other_user() -> dict[str, Any]:
    """Root may write anywhere, so a child of its becomes nobody."""
    return {"uid": NOBODY} if os.geteuid() == 0 else {}


def check_refused(bench: Bench, end: End, before: str, told: str) -> None:
    assert end.error == "CheckpointError", end.trace
    assert "Can't write to" in end.text
    assert told in end.text
    assert "To mend it: " in end.text
    # Nothing was begun: neither a merge nor a file.
    assert end.calls == 0
    assert bench.case.read(bench.work) == before
    bench.case.check_beside(bench.work)
    assert bench.hidden() == []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    before = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(before)


@pytest.mark.parametrize("name", amount(full=tuple(CASES), short=("stage", "merge")))
def test_without_permission(name: str, open_path: Path, server: Server, figures: Figures) -> None:
    bench = server.bench(name, open_path / "work")
    before = bench.case.read(bench.work)
    with figures.timed("read-only", what=bench.case.told, how="permissions"):
        with locked(bench.work), locked(bench.work / "out"):
            end = bench.run(bench.next(), **other_user())
            check_refused(bench, end, before, "permission denied")
    bench.write()


@pytest.mark.parametrize("name", amount(full=tuple(CASES), short=("stage", "merge")))
def test_on_a_read_only_disk(name: str, disk: Disk, server: Server, figures: Figures) -> None:
    bench = server.bench(name, disk.path / "work")
    before = bench.case.read(bench.work)
    disk.read_only(True)
    try:
        with figures.timed("read-only", what=bench.case.told, how="a read-only mount"):
            check_refused(bench, bench.run(bench.next()), before, "mounted read-only")
    finally:
        disk.read_only(False)
    bench.write()
