from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lamina.storage import exchange as module
from lamina.storage.exchange import PinnedError, exchange, swap_in


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("staging", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    return tmp_path / "staging", tmp_path / "run"


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_swap_call", lambda libc: None)


def content(directory: Path) -> str:
    return (directory / "content").read_text()


def supported(pair: tuple[Path, Path]) -> bool:
    try:
        exchange(*pair)
    except OSError as error:
        if error.errno not in module._NO_EXCHANGE:
            raise
        return False
    exchange(*pair)
    return True


def test_exchange_swaps_what_two_names_mean_and_keeps_both_trees(pair: tuple[Path, Path]) -> None:
    if not supported(pair):
        pytest.skip("this filesystem has no exchange")
    staging, run = pair
    before = staging.stat().st_ino, run.stat().st_ino
    exchange(staging, run)
    assert (content(staging), content(run)) == ("run", "staging")
    assert (run.stat().st_ino, staging.stat().st_ino) == before


def test_the_raw_system_call_does_the_same(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = module._libc()
    if libc is None or not hasattr(libc, "renameat2") or not supported(pair):
        pytest.skip("not Linux with renameat2")

    class WithoutWrapper:
        syscall = libc.syscall

    monkeypatch.setattr(module, "_libc", WithoutWrapper)
    exchange(*pair)
    assert content(pair[1]) == "staging"


def test_exchange_names_the_error_of_the_system(pair: tuple[Path, Path]) -> None:
    if not supported(pair):
        pytest.skip("this filesystem has no exchange")
    with pytest.raises(FileNotFoundError, match="absent"):
        exchange(pair[0], pair[0].with_name("absent"))


def test_without_an_old_directory_the_new_one_is_renamed(pair: tuple[Path, Path]) -> None:
    staging, run = pair
    goal = run.with_name("fresh")
    assert swap_in(staging, goal) is None
    assert content(goal) == "staging"
    assert not staging.exists()


def test_two_renames_where_there_is_no_exchange(pair: tuple[Path, Path], no_exchange: None) -> None:
    staging, run = pair
    old = swap_in(staging, run)
    assert old is not None
    assert old.name.startswith(".run.old-")
    assert (content(old), content(run)) == ("run", "staging")
    assert not staging.exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_a_refused_exchange_falls_back(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(one: Path, other: Path) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(module, "exchange", refused)
    swap_in(*pair)
    assert content(pair[1]) == "staging"


def test_a_failed_second_rename_puts_the_old_one_back(
    pair: tuple[Path, Path], no_exchange: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, run = pair
    rename = os.rename

    def failing(source: Path, goal: Path) -> None:
        if Path(source) == staging:
            raise OSError(errno.EIO, "broken disk")
        rename(source, goal)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="broken disk"):
        swap_in(staging, run)
    assert (content(staging), content(run)) == ("staging", "run")


def test_an_interrupt_between_the_renames_puts_the_old_one_back(
    pair: tuple[Path, Path], no_exchange: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, run = pair
    rename = os.rename

    def interrupted(source: Path, goal: Path) -> None:
        if Path(source) == staging:
            raise KeyboardInterrupt
        rename(source, goal)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap_in(staging, run)
    assert content(run) == "run"


def test_a_reader_that_recovers_in_between_does_not_stop_the_save(
    pair: tuple[Path, Path], no_exchange: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, run = pair
    rename = os.rename
    meddled = []

    def with_reader(source: Path, goal: Path) -> None:
        if Path(source) == staging and not meddled:
            aside = next(run.parent.glob(".run.old-*"))
            rename(aside, run)
            meddled.append(aside)
        rename(source, goal)

    monkeypatch.setattr(os, "rename", with_reader)
    old = swap_in(staging, run)
    assert meddled
    assert old is not None
    assert (content(old), content(run)) == ("run", "staging")


def test_a_directory_that_cannot_move_is_told_apart(
    pair: tuple[Path, Path], no_exchange: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(source: Path, goal: Path) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(PinnedError):
        swap_in(*pair)
    monkeypatch.undo()
    assert content(pair[1]) == "run"
