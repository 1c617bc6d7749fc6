"""How much is done: little in `make test`, all of it, with figures noted, in `make torture`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.torture.disk import Disk
from tests.torture.figures import Figures
from tests.torture.frame import Server

FULL = bool(os.environ.get("LAMINA_TORTURE"))
_FIGURES = pytest.StashKey[Figures]()


@dataclass(frozen=True)
class Amount:
    """How often something is done."""

    full: bool

    def of(self, full: int, short: int) -> int:
        """One of two numbers."""
        return full if self.full else short


@pytest.fixture(scope="session")
def amount() -> Amount:
    return Amount(FULL)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures()


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    return request.config.stash[_FIGURES]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    found = session.config.stash[_FIGURES]
    # Figures of a run that failed are no figures.
    if FULL and found.sections and exitstatus == pytest.ExitCode.OK:
        found.write()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    made = Server(tmp_path_factory.mktemp("notes"))
    yield made
    made.close()


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
