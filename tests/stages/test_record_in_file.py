"""Records that a stage can't be opened by: newer, damaged, or contradicting their file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lamina.errors import KeyMismatchError, LaminaError, RecordError
from lamina.stages import begin_stage, lineage, load
from tests import models
from tests.stages.chains import (
    WEIGHTS,
    Snapshot,
    answer,
    distance,
    llama_lora,
    metadata_of,
    open_with_peft,
    run_stage,
    tensors_of,
)

Values = dict[str, Any]


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    run_stage(tmp_path / "one", llama_lora(modules_to_save=["lm_head"]))
    return tmp_path / "one"


def change_record(path: Path, change: Callable[[Values], None]) -> None:
    metadata = metadata_of(path)
    values = json.loads(metadata["lamina"])
    change(values)
    metadata["lamina"] = json.dumps(values)
    save_file(tensors_of(path), path / WEIGHTS, metadata=metadata)


def refused(path: Path) -> LaminaError:
    """All three readers refuse alike, and leave the base as it was."""
    messages = set()
    base = models.tiny_llama()
    before = Snapshot(base)
    for read in (
        lambda: lineage(path),
        lambda: load(path, base),
        lambda: begin_stage(base, name="x", parent=path, mode="continue"),
    ):
        with pytest.raises(RecordError) as caught:
            read()
        messages.add(str(caught.value))
        before.check()
    assert len(messages) == 1
    return caught.value


def test_a_newer_version(stage: Path) -> None:
    expected = answer(load(stage, models.tiny_llama()))
    change_record(stage, lambda values: values.update(format_version=2, new_field={}))
    error = refused(stage)
    assert "has version 2; this Lamina knows versions up to 1" in str(error)
    assert "pip install --upgrade lamina" in str(error)
    # What the message promises.
    assert distance(answer(open_with_peft(stage)), expected) < 1e-6


def test_all_that_is_damaged_in_one_error(stage: Path) -> None:
    def damage(values: Values) -> None:
        values["stages"][0]["mode"] = "glue"
        values["stages"][0]["metrics"] = {"loss": "low"}
        values["laminae"][0]["ranks"]["model.layers.0.self_attn.q_proj"] = 0
        values["extra"] = 1

    change_record(stage, damage)
    error = refused(stage)
    assert [fault.partition(":")[0] for fault in error.faults] == [
        "stages.0.mode",
        "stages.0.metrics.loss",
        "laminae.0.ranks",
        "extra",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"x"', '{"format_version": 1}'])
def test_what_is_no_record(stage: Path, text: str) -> None:
    save_file(tensors_of(stage), stage / WEIGHTS, metadata={"lamina": text})
    assert str(stage) in str(refused(stage))


Damage = Callable[[Values], object]
CONTRADICTIONS: dict[str, tuple[Damage, str]] = {
    "another rank": (
        lambda v: v["laminae"][0]["ranks"].update({"model.layers.0.self_attn.q_proj": 3}),
        "model.layers.0.self_attn.q_proj: rank 4 in the file, 3 in the record",
    ),
    "a module too few": (
        lambda v: v["laminae"][0]["ranks"].pop("model.layers.1.self_attn.v_proj"),
        "model.layers.1.self_attn.v_proj: rank 4 in the file, 0 in the record",
    ),
    "a module too many": (
        lambda v: v["laminae"][0]["ranks"].update({"lm_head": 4}),
        "lm_head: rank 0 in the file, 4 in the record",
    ),
    "a saved module too few": (
        lambda v: v["saved_modules"].clear(),
        "lm_head.weight is in the file, not in the record",
    ),
    "a saved module too many": (
        lambda v: v["saved_modules"].update({"model.norm": "one"}),
        "model.norm is in the record, not in the file",
    ),
    "a bias too many": (
        lambda v: v["biases"].update({"lm_head.bias": "one"}),
        "lm_head.bias is in the record, not in the file",
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_record_that_contradicts_the_tensors(stage: Path, kind: str) -> None:
    change, line = CONTRADICTIONS[kind]
    change_record(stage, change)
    error = refused(stage)
    assert "contradict each other in 1 place(s)" in str(error)
    assert error.faults == (line,)


def test_owners_that_the_chain_doesnt_have(stage: Path) -> None:
    change_record(stage, lambda values: values["saved_modules"].update({"lm_head": "zero"}))
    assert "there is no stage 'zero' in the chain" in str(refused(stage))


def test_two_stages_of_one_name(stage: Path) -> None:
    change_record(stage, lambda values: values["stages"].append(values["stages"][0]))
    assert "two stages have the same name" in str(refused(stage))


def test_changed_tensors_are_noticed(stage: Path) -> None:
    metadata, tensors = metadata_of(stage), tensors_of(stage)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key] = torch.cat([tensors[key], tensors[key]])
    save_file(tensors, stage / WEIGHTS, metadata=metadata)
    assert "rank 8 in the file, 4 in the record" in str(refused(stage))


def test_a_missing_half_of_a_pair(stage: Path) -> None:
    metadata, tensors = metadata_of(stage), tensors_of(stage)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, stage / WEIGHTS, metadata=metadata)
    base = models.tiny_llama()
    before = Snapshot(base)
    with pytest.raises(KeyMismatchError, match=r"q_proj\.lora_B\.weight"):
        load(stage, base)
    before.check()
    with pytest.raises(LaminaError, match="q_proj"):
        begin_stage(base, name="x", parent=stage, mode="continue")
    before.check()
