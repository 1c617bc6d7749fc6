"""A chain on disk edited: its last stage taken off, or a stage renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lamina.checkpoint.digest import files_digest
from lamina.config import LoraConfig
from lamina.errors import CheckpointError, LaminaError, StageError
from lamina.model import PeftModel
from lamina.stages import (
    begin_stage,
    drop_last_stage,
    flatten,
    lineage,
    load,
    rename_stage,
    split,
    verify,
)
from tests import models
from tests.stages.chains import (
    CONFIG,
    WEIGHTS,
    answer,
    config_of,
    distance,
    llama_lora,
    metadata_of,
    open_with_peft,
    run_chain,
    run_stage,
    save_plain_peft,
    tensors_of,
    ulps,
)

THREE: list[tuple[str, str | None, LoraConfig | None]] = [
    ("domain", None, llama_lora(target_modules="all-linear")),
    ("chat", "stack", llama_lora(r=6, lora_alpha=3, target_modules=["q_proj", "embed_tokens"])),
    ("dpo", "merge", llama_lora(r=5, lora_alpha=7, target_modules=["o_proj", "v_proj"])),
]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    return run_chain(tmp_path_factory.mktemp("three"), THREE)


def copied(path: Path, to: Path) -> Path:
    to.mkdir()
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def data_of(path: Path) -> bytes:
    """The bytes behind the header."""
    content = (path / WEIGHTS).read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


# --- drop the last stage --------------------------------------------------------------------------


def test_what_is_left_is_the_stage_before(three: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = three[1]
    before = files_of(path)
    report = drop_last_stage(path, tmp_path / "left")
    assert report.dropped == "dpo"
    assert report.stages == ("domain", "chat")
    assert files_of(path) == before
    wanted, found = tensors_of(path.parent / "chat"), tensors_of(tmp_path / "left")
    assert wanted.keys() == found.keys()
    assert all(ulps(found[key], wanted[key]) <= 1 for key in wanted)
    expected = answer(load(path.parent / "chat", models.tiny_llama()))
    assert distance(answer(open_with_peft(tmp_path / "left")), expected) < 1e-6
    assert config_of(tmp_path / "left") == config_of(path.parent / "chat")
    theirs, ours = lineage(path.parent / "chat"), lineage(tmp_path / "left")
    assert ours.stages == theirs.stages
    assert ours.laminae == theirs.laminae
    assert ours.left_out == ()
    assert ours.weights == files_digest([tmp_path / "left" / WEIGHTS])


def test_its_recorded_answers_come_out(three: tuple[PeftModel, Path], tmp_path: Path) -> None:
    drop_last_stage(three[1], tmp_path / "left")
    assert lineage(tmp_path / "left").newest.probe is not None
    assert verify(tmp_path / "left", models.tiny_llama()).passed


def test_nothing_is_rounded_between_powers_of_two(tmp_path: Path) -> None:
    chain = [("one", None, llama_lora(lora_alpha=8)), ("two", "stack", llama_lora(lora_alpha=2))]
    _, path = run_chain(tmp_path, chain)
    drop_last_stage(path)
    for key, tensor in tensors_of(tmp_path / "one").items():
        assert torch.equal(tensors_of(path)[key], tensor)
    assert lineage(path) == lineage(tmp_path / "one")
    assert config_of(path) == config_of(tmp_path / "one")


def test_twice_in_place(three: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = copied(three[1], tmp_path / "dpo")
    (path / "notes.txt").write_text("mine")
    drop_last_stage(path)
    report = drop_last_stage(path)
    assert report.stages == ("domain",)
    assert {file.name for file in path.iterdir()} == {CONFIG, WEIGHTS, "notes.txt"}
    expected = answer(load(three[1].parent / "domain", models.tiny_llama()))
    assert distance(answer(load(path, models.tiny_llama())), expected) < 1e-6
    with pytest.raises(StageError, match="the only stage"):
        drop_last_stage(path)
    model = begin_stage(
        models.tiny_llama(), name="dpo", parent=path, mode="stack", config=llama_lora()
    )
    assert distance(answer(model.eval()), expected) < 1e-6


def test_what_went_on_training_cant_be_undone(tmp_path: Path) -> None:
    _, path = run_chain(tmp_path, [*THREE[:2], ("polish", "continue", None)])
    before = files_of(path)
    with pytest.raises(StageError, match="'polish' went on training ranks") as caught:
        drop_last_stage(path)
    assert "directory that 'chat' was saved to" in str(caught.value)
    assert files_of(path) == before


def test_a_flattened_stage_cant_be_taken_out(three: tuple[PeftModel, Path], tmp_path: Path) -> None:
    flatten(three[1], tmp_path / "flat")
    with pytest.raises(StageError, match="'dpo' is one with domain, chat"):
        drop_last_stage(tmp_path / "flat")
    run_stage(tmp_path / "next", llama_lora(), parent=tmp_path / "flat", mode="stack")
    report = drop_last_stage(tmp_path / "next")
    assert report.stages == ("domain", "chat", "dpo")
    assert distance(answer(open_with_peft(tmp_path / "next")), answer(three[0])) < 1e-6


def test_whole_modules_of_the_dropped_stage_are_the_bases_again(tmp_path: Path) -> None:
    one = llama_lora()
    two = llama_lora(r=2, modules_to_save=["lm_head"], trainable_token_indices=[4])
    model, path = run_chain(tmp_path, [("one", None, one), ("two", "stack", two)])
    drop_last_stage(path)
    assert not [key for key in tensors_of(path) if "lora" not in key]
    assert config_of(path)["modules_to_save"] is None
    assert config_of(path)["trainable_token_indices"] is None
    expected = answer(load(tmp_path / "one", models.tiny_llama()))
    assert distance(answer(open_with_peft(path)), expected) < 1e-6
    assert distance(answer(model), expected) > 1e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": ["model.norm"]}, "model.norm, trained whole by one"),
        ({"bias": "lora_only"}, r"4 bias\(es\) of one were trained anew by two"),
        ({"trainable_token_indices": [4]}, r"1 row\(s\) of model.embed_tokens by one"),
        ({"lora_bias": True}, "one sum in the file"),
    ],
)
def test_what_was_trained_anew_is_gone(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    def build() -> nn.Module:
        return models.tiny_llama(attention_bias=True)

    config = llama_lora(**settings)
    _, path = run_chain(tmp_path, [("one", None, config), ("two", "stack", config)], build=build)
    before = files_of(path)
    with pytest.raises(StageError, match=said):
        drop_last_stage(path)
    assert files_of(path) == before


def test_biases_that_are_only_written_along(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return models.tiny_llama(attention_bias=True)

    one = llama_lora(target_modules=["q_proj"], bias="lora_only")
    two = llama_lora(target_modules=["o_proj"], bias="lora_only")
    _, path = run_chain(tmp_path, [("one", None, one), ("two", "stack", two)], build=build)
    drop_last_stage(path)
    assert tensors_of(path).keys() == tensors_of(tmp_path / "one").keys()
    expected = answer(load(tmp_path / "one", build()))
    assert distance(answer(open_with_peft(path, build)), expected) < 1e-6


def test_a_crash_while_writing_leaves_the_old(
    three: tuple[PeftModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(three[1], tmp_path / "dpo")
    before = files_of(path)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no more")

    monkeypatch.setattr("lamina.stages.edit.write_stage", fail)
    monkeypatch.setattr("lamina.stages.edit.rewrite_strings", fail)
    for change in (lambda: drop_last_stage(path), lambda: rename_stage(path, "dpo", "x")):
        with pytest.raises((OSError, LaminaError)):
            change()
        assert files_of(path) == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["dpo"]


# --- rename ---------------------------------------------------------------------------------------


def test_a_new_name_everywhere(three: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = copied(three[1], tmp_path / "dpo")
    before, old = data_of(path), lineage(path)
    config = (path / CONFIG).read_bytes()
    report = rename_stage(path, "chat", "talk")
    assert report.renamed == ("chat", "talk")
    assert report.stages == ("domain", "talk", "dpo")
    record = lineage(path)
    assert [lamina.stage for lamina in record.laminae] == ["domain", "talk", "dpo"]
    assert data_of(path) == before
    assert (path / CONFIG).read_bytes() == config
    assert record.weights == old.weights == files_digest([path / WEIGHTS])
    assert metadata_of(path)["format"] == "pt"
    rename_stage(path, "talk", "chat")
    assert lineage(path) == old
    assert verify(path, models.tiny_llama()).passed


def test_owners_are_renamed_too(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return models.tiny_llama(attention_bias=True)

    config = llama_lora(bias="lora_only", modules_to_save=["lm_head"], trainable_token_indices=[3])
    model, path = run_chain(
        tmp_path, [("one", None, config), ("two", "stack", llama_lora())], build=build
    )
    expected = answer(model)
    rename_stage(path, "one", "first", tmp_path / "new")
    record = lineage(tmp_path / "new")
    assert set(record.saved_modules.values()) == {"first"}
    assert set(record.biases.values()) == {"first"}
    assert record.token_rows == {"model.embed_tokens": {"first": (3,)}}
    assert distance(answer(load(tmp_path / "new", build())), expected) < 1e-6
    flatten(tmp_path / "new", tmp_path / "flat")
    rename_stage(tmp_path / "flat", "first", "begin")
    assert lineage(tmp_path / "flat").laminae[0].made_of == ("begin", "two")


def test_elsewhere_leaves_the_input_alone(three: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = three[1]
    before = files_of(path)
    rename_stage(path, "dpo", "prefer", tmp_path / "new")
    assert files_of(path) == before
    assert lineage(tmp_path / "new").newest.name == "prefer"
    with pytest.raises(CheckpointError, match="what is read from"):
        rename_stage(path, "dpo", "prefer", path, force=True)


def test_a_plain_adapter_gets_a_record(tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"]}
    expected = save_plain_peft(tmp_path / "plain", settings)
    before = data_of(tmp_path / "plain")
    rename_stage(tmp_path / "plain", "imported", "sft")
    assert [stage.name for stage in lineage(tmp_path / "plain").stages] == ["sft"]
    assert data_of(tmp_path / "plain") == before
    assert distance(answer(open_with_peft(tmp_path / "plain")), expected) < 1e-6


def test_shards_become_one_file(three: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = copied(three[1], tmp_path / "dpo")
    tensors, metadata = tensors_of(path), metadata_of(path)
    names = {}
    for index in (0, 1):
        shard = f"adapter_model-0000{index + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[index::2])
        save_file(part, path / shard, metadata=metadata)
        names.update(dict.fromkeys(part, shard))
    (path / WEIGHTS).unlink()
    index_file = path / "adapter_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    rename_stage(path, "dpo", "prefer")
    assert {file.name for file in path.iterdir()} == {CONFIG, WEIGHTS}
    assert lineage(path).newest.name == "prefer"
    assert all(torch.equal(tensors_of(path)[key], tensor) for key, tensor in tensors.items())


def test_a_pickle_has_no_place_for_a_name(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    torch.save(tensors_of(tmp_path / "one"), tmp_path / "one" / "adapter_model.bin")
    (tmp_path / "one" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="flatten"):
        rename_stage(tmp_path / "one", "imported", "x", allow_pickle=True)
    flatten(tmp_path / "one", tmp_path / "flat", allow_pickle=True)
    rename_stage(tmp_path / "flat", "imported", "x")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("dp", "x", "there is no stage 'dp' in domain -> chat -> dpo; did you mean 'dpo'?"),
        ("dpo", "chat", "the chain already has a stage 'chat'"),
        ("dpo", "dpo", "the chain already has a stage 'dpo'"),
        ("dpo", "../up", "can't be used"),
        ("dpo", "a/b", "no folder's name should have"),
        ("dpo", "a\udcff", "is no text"),
        ("dpo", "weight.x", "can't be used"),
        ("dpo", "", "can't be used"),
    ],
)
def test_names_that_cant_be(
    three: tuple[PeftModel, Path], tmp_path: Path, old: str, new: str, said: str
) -> None:
    before = files_of(three[1])
    with pytest.raises(StageError) as caught:
        rename_stage(three[1], old, new)
    assert said in str(caught.value)
    assert files_of(three[1]) == before


def test_a_stage_that_was_left_out_keeps_its_name(
    three: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    flatten(three[1], tmp_path / "part", stages=["domain", "dpo"])
    with pytest.raises(StageError, match="'chat' is a stage that was left out"):
        rename_stage(tmp_path / "part", "dpo", "chat")


def test_a_record_without_ranks_is_told(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora(modules_to_save=["lm_head"]))
    tensors = {k: x for k, x in tensors_of(tmp_path / "one").items() if "lora" not in k}
    metadata = metadata_of(tmp_path / "one")
    record = json.loads(metadata["lamina"]) | {"laminae": []}
    save_file(tensors, tmp_path / "one" / WEIGHTS, metadata={"lamina": json.dumps(record)})
    changes = (
        lambda: flatten(tmp_path / "one", tmp_path / "out"),
        lambda: split(tmp_path / "one", tmp_path / "out"),
        lambda: drop_last_stage(tmp_path / "one", tmp_path / "out"),
    )
    for change in changes:
        with pytest.raises(CheckpointError, match="no ranks of any stage"):
            change()
    assert not (tmp_path / "out").exists()


def test_a_stage_without_ranks_goes_with_the_one_after_it(tmp_path: Path) -> None:
    _, path = run_chain(tmp_path, THREE)
    metadata = metadata_of(path)
    record = json.loads(metadata["lamina"])
    silent = {**record["stages"][1], "name": "silent"}
    record["stages"].insert(2, silent)
    save_file(tensors_of(path), path / WEIGHTS, metadata={"lamina": json.dumps(record)})
    before = files_of(path)
    with pytest.raises(StageError, match="'silent'"):
        drop_last_stage(path)
    assert files_of(path) == before
