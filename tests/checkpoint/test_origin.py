"""The chain in a file, told from names and shapes."""

from __future__ import annotations

import time
from typing import Any

import pytest

from lamina.checkpoint.origin import PREFIX, UNKNOWN, ranks_in, record_of, split_key
from lamina.checkpoint.record import Lamina, Stage, StageRecord
from lamina.config import LoraConfig
from lamina.errors import CheckpointError, RecordError

Shapes = dict[str, list[int]]


def shapes(**ranks: int) -> Shapes:
    found: Shapes = {}
    for name, rank in ranks.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = [rank, 8]
        found[f"{PREFIX}{name}.lora_B.weight"] = [6, rank]
    return found


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("base_model.model.a.b.lora_A.weight", ("a.b", "lora_A.weight")),
        ("base_model.model.a.lora_B.weight", ("a", "lora_B.weight")),
        ("base_model.model.a.lora_B.bias", ("a", "lora_B.bias")),
        ("base_model.model.emb.lora_embedding_A", ("emb", "lora_embedding_A")),
        ("base_model.model.emb.lora_embedding_B", ("emb", "lora_embedding_B")),
        ("a.lora_A.weight", ("a", "lora_A.weight")),
        ("base_model.model.head.weight", ("head.weight", None)),
        ("base_model.model.a.base_layer.bias", ("a.base_layer.bias", None)),
        ("base_model.model.xlora_A.weight", ("xlora_A.weight", None)),
    ],
)
def test_names_come_apart(key: str, parts: tuple[str, str | None]) -> None:
    assert split_key(key) == parts


def test_ranks_are_read_from_A() -> None:
    given = shapes(a=4, b=6) | {f"{PREFIX}e.lora_embedding_A": [3, 64]}
    given |= {f"{PREFIX}e.lora_embedding_B": [16, 3], f"{PREFIX}head.weight": [9, 9]}
    assert ranks_in(given) == {"a": 4, "b": 6, "e": 3}


def imported(config: LoraConfig, given: Shapes) -> StageRecord:
    return record_of(config, given, {"format": "pt"}, source="runs/plain")


def test_a_plain_adapter_is_one_stage_of_unknown_origin() -> None:
    config = LoraConfig(r=4, base_model_name_or_path="someone/tiny", revision="abc")
    record = imported(config, shapes(a=4, b=2))
    (stage,) = record.stages
    assert (stage.name, stage.mode) == (UNKNOWN, "fresh")
    assert (stage.created, stage.metrics, stage.data, stage.versions) == (None, {}, None, {})
    assert (stage.base.name_or_path, stage.base.revision) == ("someone/tiny", "abc")
    assert stage.base.shapes is None
    (lamina,) = record.laminae
    assert (lamina.stage, lamina.ranks) == (UNKNOWN, {"a": 4, "b": 2})
    assert lamina.config == config.to_dict()
    assert (record.saved_modules, record.biases) == ({}, {})


def test_what_a_plain_adapter_trained_whole() -> None:
    given = shapes(a=4) | {
        f"{PREFIX}model.head.weight": [9, 9],
        f"{PREFIX}model.head.bias": [9],
        f"{PREFIX}classifier.dense.weight": [9, 9],
        f"{PREFIX}classifier.out.weight": [9, 9],
        f"{PREFIX}a.base_layer.bias": [6],
        f"{PREFIX}norm.bias": [6],
        f"{PREFIX}e.base_layer.weight": [6, 6],
    }
    config = LoraConfig(bias="all", modules_to_save=["head", "classifier"])
    record = imported(config, given)
    assert record.saved_modules == {"model.head": UNKNOWN, "classifier": UNKNOWN}
    assert record.biases == {"a.bias": UNKNOWN, "norm.bias": UNKNOWN}


def test_names_of_whole_modules_are_endings_as_peft_means_them() -> None:
    given = shapes(a=4) | {f"{PREFIX}lm_head.weight": [9, 9]}
    for ending in ("head", "lm_head"):
        assert imported(LoraConfig(modules_to_save=[ending]), given).saved_modules == {
            "lm_head": UNKNOWN
        }
    assert imported(LoraConfig(modules_to_save=["lm_hea"]), given).saved_modules == {}


def chain(**changes: Any) -> StageRecord:
    values: dict[str, Any] = {
        "stages": (Stage(name="one", mode="fresh"), Stage(name="two", mode="stack")),
        "laminae": (
            Lamina(stage="one", config={}, ranks={"a": 4, "b": 4}),
            Lamina(stage="two", config={}, ranks={"b": 2, "c": 2}),
        ),
    }
    return StageRecord(**values | changes)


def read(record: StageRecord, given: Shapes) -> StageRecord:
    return record_of(LoraConfig(), given, record.to_metadata(), source="runs/two")


def test_a_record_whose_ranks_add_up() -> None:
    assert read(chain(), shapes(a=4, b=6, c=2)) == chain()


def faults(record: StageRecord, given: Shapes) -> tuple[str, ...]:
    with pytest.raises(RecordError, match="runs/two and its tensors contradict") as caught:
        read(record, given)
    return caught.value.faults


def test_ranks_that_dont_add_up_are_all_told() -> None:
    assert faults(chain(), shapes(a=4, b=5, d=1)) == (
        "b: rank 5 in the file, 6 in the record",
        "c: rank 0 in the file, 2 in the record",
        "d: rank 1 in the file, 0 in the record",
    )


def test_whole_modules_and_biases_have_to_be_on_record_too() -> None:
    given = shapes(a=4, b=6, c=2)
    extra = given | {f"{PREFIX}head.weight": [9, 9], f"{PREFIX}norm.bias": [6]}
    owned = chain(saved_modules={"head": "one"}, biases={"norm.bias": "two"})
    assert read(owned, extra) == owned
    assert faults(chain(), extra) == (
        "head.weight is in the file, not in the record",
        "norm.bias is in the file, not in the record",
    )
    assert faults(owned, given) == (
        "head is in the record, not in the file",
        "norm.bias is in the record, not in the file",
    )
    assert faults(chain(saved_modules={"lm_head": "one"}), extra)[0].startswith("head.weight")


def test_biases_of_adapted_layers_may_be_the_bases_own() -> None:
    given = shapes(a=4, b=6, c=2) | {f"{PREFIX}a.base_layer.bias": [6]}
    assert read(chain(), given).biases == {}


def test_wrappers_and_adapter_names_in_the_names_are_seen_through() -> None:
    given = {
        key.replace("model.a.", "model._orig_mod.a.").replace("_A.weight", "_A.default.weight"): x
        for key, x in shapes(a=4, b=2).items()
    }
    assert imported(LoraConfig(r=4), given).laminae[0].ranks == {"a": 4, "b": 2}


def test_modules_without_ranks_are_none() -> None:
    # All of them were taken away in training, as AdaLoRA does.
    given = shapes(a=4, b=0)
    assert ranks_in(given) == {"a": 4}
    assert imported(LoraConfig(r=4), given).laminae[0].ranks == {"a": 4}


@pytest.mark.parametrize("leaf", ["lora_A.weight", "lora_B.weight"])
@pytest.mark.parametrize("shape", [[], [4]])
def test_a_factor_has_two_dimensions_at_least(leaf: str, shape: list[int]) -> None:
    given = shapes(a=4) | {f"{PREFIX}a.{leaf}": shape}
    with pytest.raises(CheckpointError, match="named like factors") as caught:
        imported(LoraConfig(r=4), given)
    assert caught.value.faults == (f"{PREFIX}a.{leaf} has the shape {shape}",)


def test_many_modules_to_save_are_looked_through_fast() -> None:
    wanted = [f"x{i}_proj" for i in range(200_000)] + ["head"]
    others = {f"{PREFIX}deep.down.in.{i}.weight": [2, 2] for i in range(20)}
    began = time.process_time()
    record = imported(
        LoraConfig(r=4, modules_to_save=wanted),
        shapes(a=4) | others | {f"{PREFIX}head.weight": [2, 2]},
    )
    assert set(record.saved_modules) == {"head"}
    assert time.process_time() - began < 2
