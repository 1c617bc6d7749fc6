from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from lamina.storage import atomic, carry, exchange
from lamina.storage.atomic import atomic_directory
from tests.storage.directories import (
    CONFIG,
    KEPT,
    WEIGHTS,
    save,
    tree,
)


def test_stale_adapter_files_do_not_survive(run: Path, way: str) -> None:
    with atomic_directory(run) as staging:
        (staging / "adapter_model-00001-of-00001.safetensors").write_text("shard")
        (staging / "adapter_model.safetensors.index.json").write_text("{}")
        (staging / CONFIG).write_text("new")
    assert WEIGHTS not in tree(run)
    (run / "adapter_model.bin").write_text("pickle")
    save(run, "newer")
    assert tree(run) == {WEIGHTS: "newer", CONFIG: "newer", **KEPT}


def test_a_folder_of_both_is_merged_and_its_stale_files_are_dropped(run: Path, way: str) -> None:
    (run / "sft" / "notes").mkdir(parents=True)
    (run / "sft" / "adapter_model.bin").write_text("stale")
    (run / "sft" / "README.md").write_text("mine")
    (run / "sft" / "notes" / "adapter_model.bin").write_text("not the writer's folder")
    with atomic_directory(run) as staging:
        (staging / "sft").mkdir()
        (staging / "sft" / WEIGHTS).write_text("new sft")
        (staging / CONFIG).write_text("new")
    assert tree(run) == {
        CONFIG: "new",
        f"sft/{WEIGHTS}": "new sft",
        "sft/README.md": "mine",
        "sft/notes/adapter_model.bin": "not the writer's folder",
        **KEPT,
    }


@pytest.mark.parametrize("owned", ["mine-*", ["mine-*"], lambda name: name.startswith("mine-")])
def test_owned_is_a_glob_or_several_or_a_predicate(tmp_path: Path, owned: object) -> None:
    target = tmp_path / "run"
    with atomic_directory(target) as staging:
        (staging / "mine-1").write_text("1")
        (staging / "yours").write_text("2")
        (staging / "mine-folder").mkdir()
        (staging / "mine-folder" / "x").write_text("x")
    with atomic_directory(target, owned=owned) as staging:  # type: ignore[arg-type]
        (staging / "mine-2").write_text("3")
    assert tree(target) == {"mine-2": "3", "yours": "2"}


def test_kept_files_are_the_same_files_so_that_open_logs_go_on(run: Path, way: str) -> None:
    (run / "logs").mkdir()
    with (run / "logs" / "events").open("w") as log:
        log.write("before ")
        log.flush()
        save(run, "new")
        log.write("after")
    assert (run / "logs" / "events").read_text() == "before after"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_without_hard_links_files_are_copied(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(number, "no links here")

    os.chmod(run / "tokenizer.json", 0o640)
    monkeypatch.setattr(os, "link", refused)
    save(run, "new")
    assert tree(run) == {WEIGHTS: "new", CONFIG: "new", **KEPT}
    assert stat.S_IMODE((run / "tokenizer.json").stat().st_mode) == 0o640


def test_what_others_add_or_delete_during_the_save_is_honoured(
    run: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_in = exchange.swap_in

    def with_a_late_file(staging: Path, target: Path) -> Path | None:
        (target / "checkpoint-20").mkdir()
        (target / "checkpoint-20" / WEIGHTS).write_text("twenty")
        return swap_in(staging, target)

    monkeypatch.setattr(atomic, "swap_in", with_a_late_file)
    link = os.link

    def with_a_deleted_file(source: Path, goal: Path) -> None:
        if Path(source).name == "tokenizer.json":
            os.unlink(source)
        link(source, goal)

    monkeypatch.setattr(os, "link", with_a_deleted_file)
    save(run, "new")
    kept = {name: text for name, text in KEPT.items() if name != "tokenizer.json"}
    assert tree(run) == {
        WEIGHTS: "new",
        CONFIG: "new",
        f"checkpoint-20/{WEIGHTS}": "twenty",
        **kept,
    }


def test_an_error_on_a_folder_that_cannot_be_synced_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(number: int) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(number, "no")

        monkeypatch.setattr(os, "fsync", fsync)

    failing(errno.EINVAL)
    carry.sync_folder(tmp_path)
    failing(errno.EIO)
    with pytest.raises(OSError, match="no"):
        carry.sync_folder(tmp_path)
