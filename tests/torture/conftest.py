"""How much is done: little in `make test`, all of it, with figures noted, in `make torture`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.torture.amounts import FULL
from tests.torture.disk import Disk
from tests.torture.figures import Figures
from tests.torture.frame import Bench, Server

_FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures()


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    return request.config.stash[_FIGURES]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    found = session.config.stash[_FIGURES]
    options = session.config.option
    whole = not options.keyword and not any("::" in each for each in session.config.args)
    # Figures of a run that failed, or of a part of a file, are no figures.
    if FULL and whole and found.sections and exitstatus == pytest.ExitCode.OK:
        found.write()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    made = Server(tmp_path_factory.mktemp("notes"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def benches(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """Name of a case -> where it is tried, made at the first call."""
    made: dict[str, Bench] = {}

    def bench(name: str) -> Bench:
        if name not in made:
            made[name] = server.bench(name, tmp_path_factory.mktemp(name) / "work")
        return made[name].with_others()

    return bench


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that every user may look into, unlike pytest's own."""
    made = Path(tempfile.mkdtemp(prefix="lamina-torture-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def disk(open_path: Path) -> Iterator[Disk]:
    """A small disk of its own, in memory; skipped where nothing can be mounted."""
    made = Disk(open_path / "disk")
    made.path.mkdir()
    if not made.mount():
        pytest.skip("can't mount here")
    yield made
    made.unmount()
