"""A disk that refuses is one error of the run, whichever library was writing."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lamina.errors import PreflightError, RunError
from lamina.training.run.room import disk_faults_told

# What torch.save says of any disk that takes no more.
TORCH = "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"


@pytest.mark.parametrize(
    ("error", "free", "told"),
    [
        (OSError(28, "No space left on device"), 10**9, "No space left to go on with the run"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 10**9, "No space left"),
        (RuntimeError(TORCH), 0, "No space left to go on with the run"),
        (RuntimeError(TORCH), 10**9, "Input/output error: the disk refused to go on"),
    ],
)
def test_the_disk_is_named(
    error: Exception, free: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(RunError) as caught, disk_faults_told(tmp_path):
        raise error
    assert told in caught.value.what
    assert str(tmp_path) in caught.value.what
    assert str(error) in caught.value.faults
    assert "the same command" in (caught.value.cure or "")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), PreflightError("no gradient")])
def test_other_errors_are_left_alone(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, disk_faults_told(tmp_path):
        raise error
    assert caught.value is error
