from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lamina.errors import CheckpointError, DirectoryInUseError
from lamina.storage import atomic
from lamina.storage.atomic import atomic_directory, recover
from lamina.storage.staging import staging_directory
from tests.storage.directories import (
    CONFIG,
    KEPT,
    WEIGHTS,
    hidden,
    never_entered,
    save,
    tree,
)


def test_the_next_save_removes_what_the_dead_left(run: Path, way: str) -> None:
    for folder in (run.parent, run):
        (folder / ".chat.saving-1234-0123abcd" / "sub").mkdir(parents=True)
    (run.parent / ".chat.old-1234-0123abcd").mkdir()
    others = [".chat2.saving-1234-0123abcd", ".chat.saving-mine"]
    for name in others:
        (run.parent / name).mkdir()
    save(run, "new")
    assert hidden(run.parent) == sorted(others)
    assert hidden(run) == []


def test_a_second_save_at_the_same_time_is_told_of_the_first(run: Path, way: str) -> None:
    clock = time.strftime("%H:%M")
    with atomic_directory(run) as first:
        (first / WEIGHTS).write_text("first")
        with pytest.raises(DirectoryInUseError, match="Another thread of this process") as caught:
            never_entered(run)
        assert f"({os.getpid()}) has been writing to '{run}' since" in caught.value.what
        assert clock in caught.value.what or time.strftime("%H:%M") != clock
        # Others are none of its business, nor is a link to the same place another place.
        save(run / "checkpoint-20", "twenty")
        save(run.with_name("chat-2"), "other")
        (run.parent / "alias").symlink_to(run)
        with pytest.raises(DirectoryInUseError):
            never_entered(run.parent / "alias")
        assert (first / WEIGHTS).read_text() == "first"
        assert tree(run)[WEIGHTS] == "old"
    inside = {f"checkpoint-20/{name}": "twenty" for name in (WEIGHTS, CONFIG)}
    assert tree(run) == {WEIGHTS: "first", **KEPT, **inside}
    save(run, "second")
    assert tree(run)[WEIGHTS] == "second"
    assert hidden(run.parent) == []


def test_a_second_save_sees_one_that_writes_inside_its_target(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_staging_folder", lambda target: target)
    with atomic_directory(run) as first:
        assert first.parent == run
        with pytest.raises(DirectoryInUseError):
            never_entered(run)


def test_without_locks_the_last_of_two_saves_wins(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina.storage.staging._try_lock", lambda descriptor: None)
    with atomic_directory(run) as first:
        (first / WEIGHTS).write_text("first")
        save(run, "second")
        assert (first / WEIGHTS).read_text() == "first"
        assert (run / WEIGHTS).read_text() == "second"
    assert tree(run) == {WEIGHTS: "first", **KEPT}


def test_a_folder_that_others_lock_for_long_holds_no_save_up(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina.storage.staging._TURN_S", 0.05)
    with atomic.held(run.parent):
        save(run, "new")
        assert (run / WEIGHTS).read_text() == "new"
        with atomic_directory(run) as first:
            (first / WEIGHTS).write_text("newer")
            with pytest.raises(DirectoryInUseError):
                never_entered(run)
    assert tree(run) == {WEIGHTS: "newer", **KEPT}


def test_a_save_waits_for_its_turn_in_the_folder_that_is_there(run: Path) -> None:
    inner = run / "checkpoint-20"
    started, done = threading.Event(), threading.Event()

    def save_inside() -> None:
        started.set()
        save(inner, "twenty")
        done.set()

    with atomic.held(run):
        waiting = threading.Thread(target=save_inside)
        waiting.start()
        started.wait()
        time.sleep(0.05)
        assert not done.is_set()
        # As a save of the outer directory does while it holds it.
        run.rename(run.with_name("replaced"))
        run.mkdir()
    waiting.join()
    assert tree(run)[f"checkpoint-20/{WEIGHTS}"] == "twenty"


def test_without_locks_only_age_makes_a_staging_stale(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina.storage.staging._try_lock", lambda descriptor: None)
    leftover = run.parent / ".chat.saving-1234-0123abcd"
    leftover.mkdir()
    save(run, "new")
    assert leftover.is_dir()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    save(run, "newer")
    assert hidden(run.parent) == []


def test_a_staging_swept_while_it_was_made_is_made_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir
    made = []

    def swept(path: Path, *args: int) -> None:
        mkdir(path, *args)
        made.append(path)
        if len(made) == 1:
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", swept)
    with staging_directory(run, run.parent) as staging:
        assert staging.is_dir()
        assert len(made) == 2


def test_savers_in_parallel_each_leave_a_whole_directory(run: Path, way: str) -> None:
    failures: list[BaseException] = []
    saved: list[str] = []

    def saver(name: str) -> None:
        try:
            for turn in range(25):
                with suppress(DirectoryInUseError):
                    save(run, f"{name}{turn}")
                    saved.append(f"{name}{turn}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=saver, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = tree(run)
    assert found.pop(WEIGHTS) == found.pop(CONFIG) in saved
    assert found == KEPT
    assert hidden(run.parent) == []


def test_a_save_within_a_staging_directory_does_not_wait(tmp_path: Path) -> None:
    start = time.monotonic()
    with atomic_directory(tmp_path / "run") as staging:
        save(staging / "sft", "inner")
    assert time.monotonic() - start < 5
    assert tree(tmp_path / "run") == {f"sft/{WEIGHTS}": "inner", f"sft/{CONFIG}": "inner"}


def test_a_directory_moved_aside_while_a_save_wrote_is_not_lost(run: Path, way: str) -> None:
    with atomic_directory(run) as staging:
        (staging / CONFIG).write_text("new")
        run.rename(run.parent / ".chat.old-1234-0123abcd")
    assert tree(run) == {CONFIG: "new", **KEPT}


# Recovery


def test_recover_puts_the_old_directory_back(run: Path) -> None:
    assert recover(run) is False
    run.rename(run.parent / ".chat.old-1234-0123abcd")
    assert recover(run) is True
    assert tree(run) == {WEIGHTS: "old", CONFIG: "old", **KEPT}
    assert recover(run.parent / "never") is False
    assert recover(run.parent / "no" / "such") is False


def test_a_save_recovers_too(run: Path, way: str) -> None:
    run.rename(run.parent / ".chat.old-1234-0123abcd")
    save(run, "new")
    assert tree(run) == {WEIGHTS: "new", CONFIG: "new", **KEPT}
    assert hidden(run.parent) == []


def test_recover_waits_for_a_living_save(run: Path) -> None:
    aside = run.parent / ".chat.old-1234-0123abcd"
    run.rename(aside)
    with atomic.held(aside):
        timer = threading.Timer(0.2, lambda: (run.parent / "x").rename(run))
        (run.parent / "x").mkdir()
        timer.start()
        assert recover(run) is False
        timer.join()
    assert aside.is_dir()
    assert run.is_dir()


def test_a_directory_that_cannot_be_put_back_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = run.rename(run.parent / ".chat.old-1234-0123abcd")

    def read_only(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "rename", read_only)
    with pytest.raises(CheckpointError, match="was cut off") as caught:
        recover(run)
    assert caught.value.cure == f"mv '{aside}' '{run}'"
