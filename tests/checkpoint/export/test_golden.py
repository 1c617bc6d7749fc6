"""Every target still writes what it wrote when its file was last looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.checkpoint.export.registry import TARGETS
from tests.checkpoint.export import golden


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    golden.write_all(folder)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_writes_what_it_wrote(written: Path, target: str) -> None:
    names = sorted(file.name for file in (golden.FOLDER / target).iterdir())
    assert names == sorted(TARGETS[target].files)
    assert names == sorted(file.name for file in (written / target).iterdir())
    for name in names:
        now, then = (golden.contents(folder / target / name) for folder in (written, golden.FOLDER))
        assert now == then, name
