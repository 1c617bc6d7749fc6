"""A merge that is killed goes on from where it was; inputs and the old result are left alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamina import LoraConfig
from lamina.checkpoint.stream.restart import place_of
from lamina.errors import CheckpointError, DirectoryInUseError, FoldError
from lamina.stages.merge_report import MergeReport
from lamina.stages.merged import save_merged
from lamina.storage.staging import held
from tests import adapters, models
from tests.checkpoint.stream.merging import differing, hashes, saved, tensors_of

CONFIG = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
_TO_BE_KILLED = """
import os, signal, sys, time
from pathlib import Path
from lamina.stages.merged import save_merged
def told(done, total):
    if done > total * 0.7:
        while not Path(sys.argv[1], ".out.merging", "lamina_merge_done.txt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
save_merged(sys.argv[1] + "/adapter", sys.argv[1] + "/out", base=sys.argv[1] + "/base", told=told)
"""


class Killed(BaseException):
    """Stands for a kill: nothing that runs afterwards knows of it."""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A base in shards, an adapter, and the result that a merge has to have."""
    saved(models.tiny_llama(), tmp_path, CONFIG, dtype=torch.bfloat16, shards=True)
    merge(tmp_path, out="wanted")
    return tmp_path


def merge(
    directory: Path, out: str = "out", told: Callable[[int, int], None] | None = None
) -> MergeReport:
    return save_merged(
        directory / "adapter",
        directory / out,
        base=str(directory / "base"),
        streaming=True,
        verify="none",
        force=True,
        told=told,
    )


def killed(directory: Path, after: int) -> None:
    """A merge that is killed when so many steps are done."""
    steps = []

    def told(done: int, total: int) -> None:
        steps.append(done)
        if len(steps) == after:
            raise Killed

    with pytest.raises(Killed):
        merge(directory, told=told)


def settled(directory: Path) -> None:
    """The result is there whole, and nothing else."""
    assert differing(directory / "out", directory / "wanted") == []
    assert {f.name for f in (directory / "out").iterdir()} == {
        f.name for f in (directory / "wanted").iterdir()
    }
    assert not [entry for entry in directory.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("after", [1, 4, 9, 14, 19, 21])
def test_goes_on_after_a_kill(after: int, made: Path) -> None:
    before = hashes(made / "base"), hashes(made / "adapter")
    killed(made, after)
    assert not (made / "out").exists()
    report = merge(made)
    assert (report.kept_files > 0) == (after >= 9)
    settled(made)
    assert (hashes(made / "base"), hashes(made / "adapter")) == before


def test_goes_on_after_kill_9(made: Path) -> None:
    command = [sys.executable, "-c", _TO_BE_KILLED, str(made)]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (made / "out").exists()
    assert merge(made).kept_files > 0
    settled(made)


def test_several_kills_one_after_the_other(made: Path) -> None:
    for after in (9, 3, 2, 2):
        killed(made, after)
    assert merge(made).kept_files > 0
    settled(made)


def test_what_was_there_stays_until_the_new_one_is_whole(made: Path) -> None:
    (made / "out").mkdir()
    (made / "out" / "model.safetensors").write_text("old")
    before = hashes(made / "out")
    killed(made, 12)
    assert hashes(made / "out") == before
    merge(made)
    settled(made)


def test_another_adapter_begins_anew(made: Path) -> None:
    killed(made, 18)
    adapters.rewrite(made / "adapter", lambda file: {key: value * 2 for key, value in file.items()})
    merge(made, out="wanted")
    assert merge(made).kept_files == 0
    settled(made)


def test_another_base_begins_anew(made: Path) -> None:
    killed(made, 18)
    shard = sorted((made / "base").glob("*.safetensors"))[0]
    doubled = {key: value * 2 for key, value in load_file(shard).items()}
    save_file(doubled, shard, metadata={"format": "pt"})
    merge(made, out="wanted")
    assert merge(made).kept_files == 0
    settled(made)


def test_a_finished_file_that_was_cut_off_is_made_again(made: Path) -> None:
    killed(made, 18)
    place = place_of(made / "out")
    finished = sorted((place / "model").glob("*.safetensors"))[0]
    finished.write_bytes(finished.read_bytes()[:-10])
    merge(made)
    settled(made)


def test_a_base_that_changes_meanwhile_is_noticed(made: Path) -> None:
    shard = sorted((made / "base").glob("*.safetensors"))[0]

    def told(done: int, total: int) -> None:
        os.utime(shard, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while"):
        merge(made, told=told)
    assert not (made / "out").exists()


def test_two_at_once_are_refused(made: Path) -> None:
    killed(made, 9)
    with held(place_of(made / "out")):
        with pytest.raises(DirectoryInUseError):
            merge(made)
    merge(made)
    settled(made)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="too small") as raised:
        merge(made)
    assert "1,000 are free" in str(raised.value)
    assert not place_of(made / "out").exists()
    assert not (made / "out").exists()


def test_a_sum_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, CONFIG, dtype=torch.float16, shards=True)
    adapters.rewrite(
        tmp_path / "adapter", lambda file: {key: value * 1e5 for key, value in file.items()}
    )
    with pytest.raises(FoldError, match="NaN or Inf"):
        merge(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "base"]


def test_samples_tell_a_wrong_entry(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.stages import merged_streaming

    whole = merged_streaming.run

    def flawed(plan, source, place, told=None):  # type: ignore[no-untyped-def]
        whole(plan, source, place, told)
        file = plan.files[-1].name
        tensors = load_file(place.model / file)
        key = next(key for key in tensors if key.endswith("down_proj.weight"))
        tensors[key][0, 0] += 0.01
        save_file(tensors, place.model / file, metadata={"format": "pt"})

    monkeypatch.setattr(merged_streaming, "run", flawed)
    with pytest.raises(CheckpointError, match=r"1 tensor"):
        save_merged(made / "adapter", made / "out", base=str(made / "base"), verify="samples")
    assert not (made / "out").exists()
    assert not place_of(made / "out").exists()


def test_samples_say_how_many_entries_they_looked_at(made: Path) -> None:
    report = save_merged(made / "adapter", made / "out", base=str(made / "base"), verify="samples")
    assert report.verified is not None
    assert report.verified.how == "samples"
    assert 0.3 < report.verified.max_difference <= 0.52
    assert report.verified.unseen == 0
    assert report.verified.entries is not None
    assert report.verified.entries > 3 * len(tensors_of(made / "out"))
