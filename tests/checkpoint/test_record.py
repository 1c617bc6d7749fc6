"""The stage record as JSON: what is written stays readable, and nothing else is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lamina.checkpoint.record import (
    FORMAT_VERSION,
    KEY,
    Base,
    Lamina,
    Stage,
    StageRecord,
    json_schema,
    name_fault,
    read_record,
)
from lamina.errors import RecordError

HERE = Path(__file__).parent
SCHEMA = HERE.parents[1] / "docs" / "stage-record.schema.json"


def record() -> StageRecord:
    base = Base(
        name_or_path="someone/tiny",
        revision="abc",
        model_class="LlamaForCausalLM",
        dtype="bfloat16",
        vocab_size=64,
        parameters=22688,
        shapes="00ff",
    )
    first = Stage(
        name="domain",
        mode="fresh",
        created="2026-11-24T10:00:00+00:00",
        metrics={"loss": 1.5},
        data=["a.jsonl"],
        base=base,
        versions={"lamina": "0.1.0"},
    )
    return StageRecord(
        stages=(first, Stage(name="chat", mode="stack")),
        laminae=(
            Lamina(stage="domain", config={"r": 4}, ranks={"a": 4, "b": 4}),
            Lamina(stage="chat", config={"r": 2}, ranks={"a": 2}),
        ),
        saved_modules={"head": "chat"},
        biases={"a.bias": "domain"},
    )


def read(values: Any) -> StageRecord | None:
    return read_record({KEY: json.dumps(values)}, source="runs/chat")


def golden() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((HERE / "record_v1.json").read_text())
    return values


def test_the_schema_is_the_published_one() -> None:
    # To change it: scripts that read records elsewhere have to follow; then write it anew.
    assert json.loads(SCHEMA.read_text()) == json_schema()


def test_a_record_of_version_1_reads_as_ever() -> None:
    assert read(golden()) == record()
    assert FORMAT_VERSION == 1


def test_a_record_is_written_as_ever() -> None:
    metadata = record().to_metadata()
    assert list(metadata) == ["lamina"]
    assert json.loads(metadata["lamina"]) == golden()


def test_there_may_be_none() -> None:
    assert read_record({}) is None
    assert read_record({"format": "pt"}) is None


def test_the_newest_stage_is_the_last() -> None:
    assert record().newest.name == "chat"


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_version_is_refused_before_anything_is_judged(version: int) -> None:
    with pytest.raises(RecordError, match=f"runs/chat has version {version}; .* up to 1") as caught:
        read({"format_version": version, "stages": "in another shape"})
    assert "upgrade" in str(caught.value.cure)
    assert caught.value.faults == ()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00"])
def test_what_is_not_json(text: str) -> None:
    with pytest.raises(RecordError, match="runs/chat is not JSON"):
        read_record({KEY: text}, source="runs/chat")


@pytest.mark.parametrize("values", [[], None, 7, "x", True])
def test_what_is_no_object(values: Any) -> None:
    with pytest.raises(RecordError, match="damaged"):
        read(values)


def damaged(**changes: Any) -> tuple[str, ...]:
    with pytest.raises(RecordError, match="runs/chat is damaged") as caught:
        read(golden() | changes)
    return caught.value.faults


def test_all_faults_are_told_with_their_place() -> None:
    stages = [{"name": 3, "mode": "glue"}, {"mode": "stack", "metrics": {"loss": "low"}}]
    faults = damaged(stages=stages, biases=7, more=1)
    assert [fault.partition(":")[0] for fault in faults] == [
        "stages.0.name",
        "stages.0.mode",
        "stages.1.name",
        "stages.1.metrics.loss",
        "biases",
        "more",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"stages": [], "laminae": [], "saved_modules": {}, "biases": {}}, "at least one stage"),
        ({"stages": golden()["stages"][:1]}, "there is no stage 'chat' in the chain"),
        ({"stages": golden()["stages"][:1] * 2}, "two stages have the same name"),
        ({"biases": {"a.bias": "sft"}}, "there is no stage 'sft' in the chain"),
        (
            {"laminae": [{"stage": "chat", "config": {}, "ranks": {"a": 0}}]},
            "a rank is a positive integer",
        ),
        ({"format_version": "one"}, "format_version"),
    ],
)
def test_what_contradicts_itself(changes: dict[str, Any], line: str) -> None:
    assert any(line in fault for fault in damaged(**changes))


def test_a_record_doesnt_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        record().stages[0].name = "other"  # type: ignore[misc]


def test_reading_a_record_needs_no_torch() -> None:
    code = "import sys, lamina.checkpoint.origin; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("version", [0, -1, True, "1", 99.0, 1.0, None])
def test_versions_are_counted_from_one(version: Any) -> None:
    assert damaged(format_version=version)


@pytest.mark.parametrize("rank", ["4", 4.0, True, None, [4]])
def test_a_rank_is_no_text_of_digits(rank: Any) -> None:
    lamina = {"stage": "chat", "config": {}, "ranks": {"a": rank}}
    assert any("laminae.0.ranks.a" in fault for fault in damaged(laminae=[lamina]))


@pytest.mark.parametrize(
    "name", ["", "..", "../up", "/etc/x", "a.b", "a\0", "a\nb", "\x1b[2J", "x" * 201]
)
def test_a_stage_has_no_name_that_is_a_way_out(name: str) -> None:
    assert name_fault(name) is not None
    stage = {**golden()["stages"][0], "name": name}
    assert any("the stage" in fault for fault in damaged(stages=[stage], laminae=[]))


def test_names_that_stages_may_have() -> None:
    assert [name_fault(name) for name in ("sft", "a/b", "phase 2", "é", "x" * 200)] == [None] * 5


def test_a_chain_is_not_endless() -> None:
    stages = [{"name": f"s{i}", "mode": "continue"} for i in range(1_001)]
    found = damaged(stages=stages, laminae=[], saved_modules={}, biases={})
    assert any("at most 1,000 stages" in fault for fault in found)


def test_a_field_twice_is_damage() -> None:
    text = json.dumps(golden())
    with pytest.raises(RecordError, match="'stages' twice"):
        read_record({KEY: text.replace("{", '{"stages": [],', 1)})
