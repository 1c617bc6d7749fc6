"""A run that is made once, for tests that only look at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.training.report import ReportResult, write_report
from tests.training.report import made


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages, and one beside them that was rolled back."""
    stages = (*made.CHAIN[:2], made.REFUSED, made.CHAIN[2])
    return made.write_run(tmp_path_factory.mktemp("runs") / "assistant", stages)


@pytest.fixture(scope="session")
def reported(finished: Path) -> ReportResult:
    """The report of it."""
    return write_report(finished)
