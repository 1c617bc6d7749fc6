from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from lamina.errors import CheckpointError
from lamina.storage import atomic, exchange
from lamina.storage.atomic import atomic_directory
from tests.storage.directories import (
    CONFIG,
    KEPT,
    WEIGHTS,
    clash,
    fail_halfway,
    hidden,
    never_entered,
    save,
    tree,
)


def test_a_first_save_makes_the_directory_and_its_parents(tmp_path: Path, way: str) -> None:
    target = tmp_path / "a" / "b" / "c"
    save(target, "new")
    assert tree(target) == {WEIGHTS: "new", CONFIG: "new"}
    assert hidden(target.parent) == []


def test_a_second_save_replaces_its_files_and_keeps_everything_else(run: Path, way: str) -> None:
    save(run, "new")
    assert tree(run) == {WEIGHTS: "new", CONFIG: "new", **KEPT}
    assert hidden(run.parent) == []


def test_nothing_shows_before_the_end(run: Path, way: str) -> None:
    with atomic_directory(run) as staging:
        (staging / WEIGHTS).write_text("new")
        assert staging.parent == run.parent
        assert tree(run) == {WEIGHTS: "old", CONFIG: "old", **KEPT}
    assert (run / WEIGHTS).read_text() == "new"


def test_a_linked_target_stays_a_link(run: Path, tmp_path: Path, way: str) -> None:
    link = tmp_path / "current"
    link.symlink_to("runs/chat")
    save(link, "new")
    assert link.is_symlink()
    assert (run / WEIGHTS).read_text() == "new"
    ahead = tmp_path / "next"
    ahead.symlink_to("runs/next")
    save(ahead, "next")
    assert (tmp_path / "runs" / "next" / WEIGHTS).read_text() == "next"


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(Path("~/run"), "new")
    assert (tmp_path / "run" / WEIGHTS).read_text() == "new"


def test_permissions_are_those_of_mkdir_or_of_the_old_directory(run: Path, way: str) -> None:
    plain = run.with_name("plain")
    plain.mkdir()
    save(run.with_name("fresh"), "new")
    assert run.with_name("fresh").stat().st_mode == plain.stat().st_mode
    os.chmod(run, 0o2750)
    os.chmod(run / "checkpoint-10", 0o711)
    save(run, "new")
    assert stat.S_IMODE(run.stat().st_mode) == 0o2750
    assert stat.S_IMODE((run / "checkpoint-10").stat().st_mode) == 0o711


def test_a_very_long_name_fits(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 250)
    save(target, "old")
    save(target, "new")
    assert tree(target) == {WEIGHTS: "new", CONFIG: "new"}


def test_files_and_folders_are_durable_before_the_swap_and_the_name_after(
    run: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, swap_in = os.fsync, exchange.swap_in

    def noted(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def swapped(staging: Path, target: Path) -> Path | None:
        events.append("swap")
        return swap_in(staging, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(atomic, "swap_in", swapped)
    save(run, "new")
    before, after = events[: events.index("swap")], events[events.index("swap") + 1 :]
    names = [Path(name).name for name in before]
    assert {WEIGHTS, CONFIG, "checkpoint-10", "sft"} <= set(names)
    assert names.index(WEIGHTS) < names.index("checkpoint-10")
    assert any(name.startswith(".chat.saving-") for name in names)
    assert after == [str(run.parent)]


# Failures


def test_an_exception_leaves_the_old_directory_and_no_staging(run: Path, way: str) -> None:
    before = tree(run), run.stat().st_ino
    with pytest.raises(KeyboardInterrupt):
        fail_halfway(run, KeyboardInterrupt())
    assert (tree(run), run.stat().st_ino) == before
    assert hidden(run.parent) == []


@pytest.mark.parametrize("error", [ZeroDivisionError(), FileNotFoundError(2, "gone", "elsewhere")])
def test_an_error_of_the_writer_comes_through_as_it_is(run: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        fail_halfway(run, error)
    assert caught.value is error


def test_a_failed_first_save_leaves_no_parents(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_halfway(tmp_path / "a" / "b" / "c", KeyboardInterrupt())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_error(run: Path, error: Exception) -> None:
    with pytest.raises(CheckpointError, match="No space left to save") as caught:
        fail_halfway(run, error)
    assert caught.value.__cause__ is error
    assert "bytes free" in caught.value.faults[1]
    assert tree(run) == {WEIGHTS: "old", CONFIG: "old", **KEPT}
    assert hidden(run.parent) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (RuntimeError("Error while serializing: I/O error (os error 5)"), "Input/output error"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ],
)
def test_a_disk_that_refuses_is_one_clear_error(run: Path, error: Exception, told: str) -> None:
    with pytest.raises(CheckpointError, match=f"{told}: the disk refused to save '{run}'"):
        fail_halfway(run, error)
    assert tree(run) == {WEIGHTS: "old", CONFIG: "old", **KEPT}


def test_a_disk_that_fills_while_entries_are_carried(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(CheckpointError, match="No space left to save"):
        save(run, "new")
    monkeypatch.undo()
    assert tree(run) == {WEIGHTS: "old", CONFIG: "old", **KEPT}
    assert hidden(run.parent) == []


def test_a_target_that_is_a_file_or_below_one_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        never_entered(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Can't make .*: '.*model.safetensors' is a file"):
        never_entered(tmp_path / "model.safetensors" / "run")
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("locked", ["chat", "runs"])
def test_an_unwritable_place_is_refused_at_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, locked: str
) -> None:
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != locked and access(path, mode)
    )
    target = run if locked == "chat" else run.with_name("fresh")
    with pytest.raises(CheckpointError, match=rf"Can't write to '.*{locked}'"):
        never_entered(target)


def test_a_system_error_while_preparing_is_a_checkpoint_error(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "x")

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        save(run, "new")


def test_a_file_never_takes_the_place_of_a_folder(run: Path) -> None:
    with pytest.raises(CheckpointError, match="take the place of folders") as caught:
        clash(run)
    assert caught.value.faults == (
        "'tokenizer.json' is a file there",
        "'checkpoint-10' is a folder there",
    )
    assert tree(run) == {WEIGHTS: "old", CONFIG: "old", **KEPT}


def test_a_really_full_disk(tmp_path: Path, mount) -> None:  # type: ignore[no-untyped-def]
    disk = mount(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "none")
    save(disk / "run", "old")
    with pytest.raises(CheckpointError, match="No space left to save"):
        save(disk / "run", "x" * (2 << 20))
    assert tree(disk / "run") == {WEIGHTS: "old", CONFIG: "old"}
    assert hidden(disk) == []
    save(disk / "run", "new")
    assert tree(disk / "run") == {WEIGHTS: "new", CONFIG: "new"}


def test_a_read_only_disk_is_refused_at_once(tmp_path: Path, mount) -> None:  # type: ignore[no-untyped-def]
    disk = mount(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "none")
    with pytest.raises(CheckpointError, match=r"Can't write to .* mounted read-only"):
        save(disk / "run", "new")


def test_a_swap_that_is_not_durable_is_undone(
    run: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = run.stat().st_ino
    monkeypatch.setattr(atomic, "sync_folder", full)
    with pytest.raises(CheckpointError, match="what was there before is untouched"):
        save(run, "new")
    assert tree(run) == {WEIGHTS: "old", CONFIG: "old", **KEPT}
    assert run.stat().st_ino == before
    with pytest.raises(CheckpointError, match="No space left"):
        save(run.with_name("fresh"), "new")
    assert os.listdir(run.parent) == ["chat"]
