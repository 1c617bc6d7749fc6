from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lamina.storage import atomic, exchange, inplace
from lamina.storage.atomic import atomic_directory
from tests.storage.directories import (
    CONFIG,
    KEPT,
    WEIGHTS,
    hidden,
    save,
    tree,
)


@pytest.mark.parametrize("inside", [".", "checkpoint-10"])
def test_the_working_directory_keeps_its_identity(
    run: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    monkeypatch.chdir(run / inside)
    identity = run.stat().st_ino
    (run / "adapter_model.bin").write_text("stale")
    save(Path("." if inside == "." else ".."), "new")
    assert run.stat().st_ino == identity
    assert os.path.isdir(os.getcwd())
    assert tree(run) == {WEIGHTS: "new", CONFIG: "new", **KEPT}
    assert hidden(run.parent) == hidden(run) == []


def test_in_place_the_weights_come_first_and_the_config_last(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    replace = os.replace

    def noted(source: Path, goal: Path) -> None:
        if Path(goal).is_relative_to(run) and ".saving-" not in str(goal):
            order.append(str(Path(goal).relative_to(run)))
        replace(source, goal)

    monkeypatch.setattr(os, "replace", noted)
    monkeypatch.chdir(run)
    with atomic_directory(run) as staging:
        (staging / "sft").mkdir()
        for name in (CONFIG, "README.md", WEIGHTS, f"sft/{WEIGHTS}"):
            (staging / name).write_text("new")
    assert order == [WEIGHTS, f"sft/{WEIGHTS}", "README.md", CONFIG]
    assert (run / "sft" / WEIGHTS).read_text() == "new"


def test_a_parent_without_write_permission_needs_no_sibling(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != run.parent and access(path, mode)
    )
    with atomic_directory(run) as staging:
        assert staging.parent == run
        (staging / WEIGHTS).write_text("new")
    assert tree(run) == {WEIGHTS: "new", **KEPT}


def test_a_pinned_directory_found_out_late_is_filled_in_place(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pinned(staging: Path, target: Path) -> None:
        raise exchange.PinnedError(errno.EBUSY, "busy", str(target))

    monkeypatch.setattr(atomic, "swap_in", pinned)
    replace = os.replace

    def other_filesystem(source: Path, goal: Path) -> None:
        if (
            Path(source).parent.parent != Path(goal).parent.parent
            and run not in Path(source).parents
        ):
            raise OSError(errno.EXDEV, "another filesystem")
        replace(source, goal)

    monkeypatch.setattr(inplace.os, "replace", other_filesystem)
    save(run, "new")
    assert tree(run) == {WEIGHTS: "new", CONFIG: "new", **KEPT}
    assert hidden(run.parent) == hidden(run) == []


def test_a_mount_point_is_filled_in_place(run: Path, mount) -> None:  # type: ignore[no-untyped-def]
    mount(run, "-t", "tmpfs", "none")
    for content in ("old", "new"):
        with atomic_directory(run) as staging:
            # What is written beside it would have to be copied across.
            assert staging.parent == run
            (staging / WEIGHTS).write_text(content)
            (staging / CONFIG).write_text(content)
        (run / "tokenizer.json").write_text("tokens")
    assert tree(run) == {WEIGHTS: "new", CONFIG: "new", "tokenizer.json": "tokens"}
    assert hidden(run.parent) == hidden(run) == []


def test_a_bind_mount_of_the_same_filesystem_is_filled_in_place(
    run: Path, tmp_path: Path, mount
) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "source dir"
    source.mkdir()
    mount(run, "--bind", str(source))
    save(run, "new")
    assert tree(source) == {WEIGHTS: "new", CONFIG: "new"}


def test_a_mount_inside_keeps_its_content(run: Path, tmp_path: Path, mount) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "source"
    source.mkdir()
    (source / WEIGHTS).write_text("outside")
    mount(run / "s f", "--bind", str(source))
    with atomic_directory(run) as staging:
        (staging / "s f").mkdir()
        (staging / "s f" / CONFIG).write_text("inside")
    assert tree(source) == {CONFIG: "inside"}
    assert tree(run) == {f"s f/{CONFIG}": "inside", **KEPT}
