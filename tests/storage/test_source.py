from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import CheckpointError, MissingFileError
from lamina.storage.source import AdapterFiles, find_adapter, find_config
from tests.storage.directories import CONFIG, INDEX, PICKLE, SHARDS, WEIGHTS, fill, write_index

pytestmark = pytest.mark.usefixtures("no_network")


# Local directories


@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory_with_one_safetensors_file(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    fill(tmp_path, CONFIG, WEIGHTS, PICKLE)
    assert find_adapter(kind(tmp_path)) == AdapterFiles(
        config=tmp_path / CONFIG,
        weights=(tmp_path / WEIGHTS,),
        root=str(tmp_path),
        pickle=False,
    )
    assert find_config(kind(tmp_path)) == tmp_path / CONFIG


def test_a_relative_path_and_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "runs" / "chat", CONFIG, WEIGHTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("runs/chat", "runs/chat/", "./runs/chat", "~/runs/chat"):
        assert find_adapter(name).weights[0].samefile(tmp_path / "runs" / "chat" / WEIGHTS)


def test_a_subfolder(tmp_path: Path) -> None:
    fill(tmp_path, CONFIG, WEIGHTS, f"sft/{CONFIG}", f"sft/{WEIGHTS}")
    found = find_adapter(tmp_path, subfolder="sft/")
    assert found.config == tmp_path / "sft" / CONFIG
    assert found.weights == (tmp_path / "sft" / WEIGHTS,)
    assert found.root == str(tmp_path / "sft")


@pytest.mark.parametrize("index", [INDEX, "model.safetensors.index.json"])
def test_shards_are_those_of_the_index(tmp_path: Path, index: str) -> None:
    fill(tmp_path, CONFIG, *SHARDS, "adapter_model-00004-of-00003.safetensors")
    write_index(tmp_path, (SHARDS[2], SHARDS[0], SHARDS[1], SHARDS[0]), index)
    assert find_adapter(tmp_path).weights == tuple(tmp_path / name for name in SHARDS)


def test_the_index_of_a_full_model_beside_it_is_not_followed(tmp_path: Path) -> None:
    fill(tmp_path, CONFIG, PICKLE)
    write_index(tmp_path, ("model-00001-of-00001.safetensors",), "model.safetensors.index.json")
    assert find_adapter(tmp_path, allow_pickle=True).weights == (tmp_path / PICKLE,)


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    fill(tmp_path, CONFIG, SHARDS[1])
    write_index(tmp_path, SHARDS)
    with pytest.raises(MissingFileError, match="1 of the 3 shards") as caught:
        find_adapter(tmp_path)
    assert caught.value.faults == (f"'{SHARDS[0]}' is missing", f"'{SHARDS[2]}' is missing")


def test_an_index_that_leads_outside_is_not_followed(tmp_path: Path) -> None:
    root = fill(tmp_path / "run", CONFIG, SHARDS[0])
    fill(tmp_path, "secret.safetensors")
    bad = {
        "../secret.safetensors": "leads out",
        "x/../../secret.safetensors": "leads out",
        "..\\secret.safetensors": "leads out",
        str(tmp_path / "secret.safetensors"): "absolute",
        "C:\\secret.safetensors": "absolute",
        "C:secret.safetensors": "absolute",
        "\\\\host\\share\\secret.safetensors": "absolute",
        "adapter_model-00001-of-00001.bin": "not a safetensors",
    }
    write_index(root, (SHARDS[0], *bad))
    with pytest.raises(CheckpointError, match="can't be followed") as caught:
        find_adapter(root)
    assert len(caught.value.faults) == len(bad)
    for name, fault in bad.items():
        assert any(f"'{name}'" in line and fault in line for line in caught.value.faults)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}']
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    fill(tmp_path, CONFIG, SHARDS[0])
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        find_adapter(tmp_path)


def test_shards_without_their_index(tmp_path: Path) -> None:
    fill(tmp_path, CONFIG, *SHARDS)
    with pytest.raises(MissingFileError, match="not their index"):
        find_adapter(tmp_path)


def test_a_pickle_is_only_found_when_asked_for(tmp_path: Path) -> None:
    fill(tmp_path, CONFIG, PICKLE)
    with pytest.raises(CheckpointError, match="can run any code") as caught:
        find_adapter(tmp_path)
    assert "allow_pickle=True" in str(caught.value.cure)
    found = find_adapter(tmp_path, allow_pickle=True)
    assert (found.weights, found.pickle) == ((tmp_path / PICKLE,), True)
    fill(tmp_path, WEIGHTS)
    found = find_adapter(tmp_path, allow_pickle=True)
    assert (found.weights, found.pickle) == ((tmp_path / WEIGHTS,), False)


def test_a_config_without_weights(tmp_path: Path) -> None:
    fill(tmp_path, CONFIG, "README.md")
    with pytest.raises(MissingFileError, match="no weights") as caught:
        find_adapter(tmp_path)
    assert "README.md" in caught.value.faults[0]


def test_weights_that_are_a_dead_link_are_missing(tmp_path: Path) -> None:
    fill(tmp_path, CONFIG)
    (tmp_path / WEIGHTS).symlink_to("blobs/gone")
    with pytest.raises(MissingFileError, match="no weights"):
        find_adapter(tmp_path)


# Directories that are something else


def test_named_adapters_in_subfolders_are_listed(tmp_path: Path) -> None:
    fill(tmp_path, f"sft/{CONFIG}", f"dpo/{CONFIG}", "runs/events", "README.md")
    with pytest.raises(MissingFileError, match="did you mean subfolder='dpo'") as caught:
        find_adapter(tmp_path)
    assert caught.value.faults == (
        "adapter in subfolder 'dpo'",
        "adapter in subfolder 'sft'",
    )
    assert caught.value.cure == f"PeftModel.from_pretrained(model, '{tmp_path}', subfolder='dpo')"


def test_the_last_checkpoint_of_a_training_run_is_suggested(tmp_path: Path) -> None:
    fill(tmp_path, f"checkpoint-9/{CONFIG}", f"checkpoint-100/{CONFIG}", "checkpoint-200/x")
    with pytest.raises(MissingFileError, match="output of a training run") as caught:
        find_config(tmp_path)
    assert caught.value.cure == f"PeftModel.from_pretrained(model, '{tmp_path / 'checkpoint-100'}')"
    assert caught.value.faults == (
        "adapter in 'checkpoint-9'",
        "adapter in 'checkpoint-100'",
        "no adapter at the top in 'checkpoint-200'",
    )


def test_a_full_model_is_called_one(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", "model.safetensors")
    with pytest.raises(MissingFileError, match="is a full model") as caught:
        find_adapter(tmp_path)
    assert caught.value.cure == f"AutoModelForCausalLM.from_pretrained('{tmp_path}')"


def test_anything_else_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="not an adapter") as caught:
        find_adapter(tmp_path)
    assert caught.value.faults == ("it is empty",)
    fill(tmp_path, "adapter_confg.json", *(f"z{n}" for n in range(20)))
    with pytest.raises(MissingFileError) as caught:
        find_adapter(tmp_path)
    assert "and 13 more" in caught.value.faults[0]
    assert caught.value.faults[1] == "'adapter_confg.json' is spelled almost like it"


def test_the_files_of_an_adapter_are_no_misspellings_of_each_other(tmp_path: Path) -> None:
    fill(tmp_path, WEIGHTS)
    with pytest.raises(MissingFileError) as caught:
        find_adapter(tmp_path)
    assert caught.value.faults == (f"it has {WEIGHTS}",)


def test_a_file_in_place_of_its_directory(tmp_path: Path) -> None:
    fill(tmp_path, CONFIG, WEIGHTS)
    with pytest.raises(CheckpointError, match="is a file") as caught:
        find_adapter(tmp_path / WEIGHTS)
    assert caught.value.cure == f"give '{tmp_path}'"


def test_a_subfolder_that_is_not_there(tmp_path: Path) -> None:
    fill(tmp_path, f"sft/{CONFIG}", f"dpo/{CONFIG}")
    with pytest.raises(MissingFileError, match="no subfolder 'sftt'") as caught:
        find_adapter(tmp_path, subfolder="sftt")
    assert caught.value.cure == "pass subfolder='sft'"


# Paths that don't exist


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("./runs/caht", "runs/chat"),
        ("runs/caht", "runs/chat"),
        ("rusn/chat/", "runs/chat"),
        ("../here/rusn/chat", "../here/runs/chat"),
        ("a/b/c", None),
        ("~/nowhere", None),
        ("D:\\x\\y", None),
    ],
)
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, meant: str | None
) -> None:
    fill(tmp_path / "here" / "runs" / "chat", CONFIG)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    with pytest.raises(MissingFileError, match="There is no directory") as caught:
        find_adapter(name)
    assert caught.value.cure == (f"did you mean '{meant}'?" if meant else "check the path")
    with pytest.raises(FileNotFoundError):
        find_config(tmp_path / "absent")


def test_a_path_object_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="There is no directory"):
        find_adapter(Path("owner/name"))


@pytest.mark.parametrize(
    "url",
    ["https://huggingface.co/owner/name", "https://hf.co/owner/name/tree/main", "hf://owner/name"],
)
def test_an_address_is_told_apart(url: str) -> None:
    with pytest.raises(MissingFileError, match="is an address") as caught:
        find_adapter(url)
    assert caught.value.cure == "'owner/name'"


def test_an_unknown_home_and_an_unreadable_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingFileError, match="There is no directory"):
        find_adapter("~no-such-user/run")
    fill(tmp_path, CONFIG, WEIGHTS)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="can't be read: permission denied"):
        find_adapter(tmp_path)


def test_a_save_that_was_cut_off_is_put_right_before_reading(tmp_path: Path) -> None:
    fill(tmp_path / ".run.old-12-0123abcd", CONFIG, WEIGHTS)
    assert find_adapter(tmp_path / "run").weights == (tmp_path / "run" / WEIGHTS,)
    fill(tmp_path / "run" / ".sft.old-12-0123abcd", CONFIG, WEIGHTS)
    found = find_adapter(tmp_path / "run", subfolder="sft")
    assert found.config == tmp_path / "run" / "sft" / CONFIG


# What others write


@pytest.mark.parametrize("safe", [True, False])
def test_what_peft_writes_is_found(tmp_path: Path, safe: bool) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    model.add_adapter("sft", config)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    name = WEIGHTS if safe else PICKLE
    for subfolder, folder in ((None, tmp_path), ("sft", tmp_path / "sft")):
        found = find_adapter(tmp_path, subfolder=subfolder, allow_pickle=not safe)
        assert (found.config, found.weights) == (folder / CONFIG, (folder / name,))
        assert found.pickle is not safe


def test_the_writer_and_the_finder_need_no_torch() -> None:
    code = "import sys, lamina.storage.atomic, lamina.storage.source; print(*sys.modules)"
    paths = str(Path(lamina.__file__).parents[1])
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    ).stdout.split()
    assert "torch" not in loaded
    assert "huggingface_hub" not in loaded
