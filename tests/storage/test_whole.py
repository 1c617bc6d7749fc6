"""A text file is the old one or the new one, and nothing of a failed write stays beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lamina.storage.whole import write_whole


def test_a_failed_write_leaves_the_old_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.json"
    write_whole(file, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_a_dead_process_left_is_taken_by_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".run.json.new").write_text("a text that is longer, and cut o")
    write_whole(tmp_path / "run.json", "new")
    assert (tmp_path / "run.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
