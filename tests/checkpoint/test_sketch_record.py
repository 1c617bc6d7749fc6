"""A sketch in a record: folded names, what is refused of it, and what is left out of a chain."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.checkpoint.record import KEY, Base, Lamina, Sketch, Stage, StageRecord, read_record
from lamina.checkpoint.sketch import compare
from lamina.checkpoint.sketch.folding import count, fold, unfold
from lamina.checkpoint.sketch.memory import ModelWeights, sketch_model
from lamina.errors import RecordError
from tests import models


def metadata(change: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, str]:
    """The header of a stage over a perceptron, with a change to the sketch."""
    sketch = sketch_model(models.perceptron())
    record = StageRecord(
        stages=(Stage(name="one", mode="fresh", base=Base(sketch=sketch)),),
        laminae=(Lamina(stage="one", config={"r": 4}, ranks={"up": 4}),),
    )
    values = json.loads(record.to_metadata()[KEY])
    if change is not None:
        change(values["stages"][0]["base"]["sketch"])
    return {KEY: json.dumps(values)}


def test_a_sketch_comes_back_from_a_record() -> None:
    record = read_record(metadata())
    assert record is not None
    assert record.newest.base.sketch == sketch_model(models.perceptron())


def test_a_record_without_a_sketch_has_no_entry_for_one() -> None:
    assert "sketch" not in Base(name_or_path="someone/tiny").model_dump_json()


def values_of(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "values not base64": lambda s: s.update(values="!!!!"),
    "values too short": lambda s: s.update(values=s["values"][:-8]),
    "values of half a number": lambda s: s.update(values=values_of(b"\0" * 3)),
    "offsets too short": lambda s: s.update(offsets=""),
    "no samples": lambda s: s.update(samples=0),
    "odd samples": lambda s: s.update(samples=3),
    "negative samples": lambda s: s.update(samples=-2),
    "many samples": lambda s: s.update(samples=10**9),
    "not a shape": lambda s: s.update(tensors=["up.weight 24by16"]),
    "negative shape": lambda s: s.update(tensors=["up.weight -24x16"]),
    "no shape": lambda s: s.update(tensors=["up.weight"]),
    "empty tensor with values": lambda s: s.update(
        tensors=["up.weight 0x16"], values=values_of(b"\0" * 64), offsets=values_of(b"\0" * 16)
    ),
    "digits that are none to Python": lambda s: s.update(tensors=["up.weight ²x16"]),
    "absurd shape": lambda s: s.update(tensors=[f"up.weight {10**15}x{10**15}"]),
    "long shape": lambda s: s.update(tensors=["up.weight " + "9" * 100_000]),
    "many dimensions": lambda s: s.update(tensors=["up.weight " + "x".join("1" * 1000)]),
    "unknown note": lambda s: s.update(tensors=["up.weight 24x16 stolen"]),
    "a run without end": lambda s: s.update(tensors=["layers.{0-}.weight 4"]),
    "a run backwards": lambda s: s.update(tensors=["layers.{9-1}.weight 4"]),
    "an endless run": lambda s: s.update(tensors=["layers.{0-9999999}.weight 4"]),
    "a product of runs": lambda s: s.update(tensors=[".".join(["{0-9999}"] * 40) + " 4"]),
    "values that are numbers": lambda s: s.update(values=[1, 2, 3]),
    "an entry of another version": lambda s: s.update(unknown=1),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_broken_sketch_is_a_damaged_record(change: Callable[[dict[str, Any]], Any]) -> None:
    began = time.perf_counter()
    with pytest.raises(RecordError, match="damaged") as caught:
        read_record(metadata(change))
    assert caught.value.faults[0].startswith("stages.0.base.sketch")
    assert len(str(caught.value)) < 2_000
    assert time.perf_counter() - began < 1


UNREADABLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "offset out of its window": lambda s: s.update(offsets=values_of(b"\xff" * 48)),
    "twice the same": lambda s: s.update(tensors=["up.bias 24", "up.bias 24", "up.weight 24x16"]),
}


@pytest.mark.parametrize("change", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_broken_inside_is_told_where_it_is_compared(
    change: Callable[[dict[str, Any]], Any],
) -> None:
    record = read_record(metadata(change))
    assert record is not None
    sketch = record.newest.base.sketch
    assert sketch is not None
    with pytest.raises(RecordError, match="sketch of the base in the stage record is damaged"):
        compare(sketch, ModelWeights(models.perceptron()))


def test_many_absurd_sketches_take_no_time_to_read() -> None:
    absurd = {"tensors": ["a.{0-199999}.b 4096x4096 unread"], "values": "", "offsets": ""}
    text = metadata(lambda s: s.update(absurd))[KEY]
    values = json.loads(text)
    stage = values["stages"][0]
    values["stages"] = [{**stage, "name": f"s{number}"} for number in range(1000)]
    values["laminae"][0]["stage"] = "s0"
    began = time.perf_counter()
    assert read_record({KEY: json.dumps(values)}) is not None
    assert time.perf_counter() - began < 1


def test_a_sketch_by_a_newer_rule_is_told_and_not_compared() -> None:
    record = read_record(metadata(lambda s: s.update(version=2, values="in another way")))
    assert record is not None
    sketch = record.newest.base.sketch
    assert sketch is not None
    likeness = compare(sketch, ModelWeights(models.perceptron(seed=1)), name="someone/tiny")
    assert (likeness.verdict, likeness.ok) == ("unknown", True)
    assert "a newer Lamina made its sketch" in likeness.sentence


def test_other_values_are_another_model() -> None:
    # Nothing tells them from a sketch of other weights: the base is refused, and nothing breaks.
    sketch = sketch_model(models.perceptron())
    flipped = bytes(255 - byte for byte in base64.b64decode(sketch.values))
    other = sketch.model_copy(update={"values": values_of(flipped)})
    assert compare(other, ModelWeights(models.perceptron())).verdict == "other"
    nan = sketch.model_copy(update={"values": values_of(b"\xff\x7f" * (len(flipped) // 2))})
    assert compare(nan, ModelWeights(models.perceptron())).verdict == "other"


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_mutated_sketch_is_refused_or_read(data: st.DataObject) -> None:
    text = json.dumps(sketch_model(models.perceptron()).model_dump(mode="json"))
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start, min(len(text), start + 8)))
    mutant = text[:start] + data.draw(st.text('0123456789-{},x "ab', max_size=8)) + text[end:]
    try:
        sketch = Sketch.model_validate_json(mutant)
    except ValueError:
        return
    with contextlib.suppress(RecordError):
        compare(sketch, ModelWeights(models.perceptron()))


# --- folded names --------------------------------------------------------------------------------


def test_numbered_names_fold_together() -> None:
    names = [
        f"layers.{layer}.experts.{expert}.{leaf}"
        for layer in (0, 1, 2, 5)
        for expert in range(64)
        for leaf in ("w1", "w2")
    ]
    assert fold(dict.fromkeys(names, "4x4")) == (
        "layers.{0-2,5}.experts.{0-63}.w1 4x4",
        "layers.{0-2,5}.experts.{0-63}.w2 4x4",
    )
    assert count("layers.{0-2,5}.experts.{0-63}.w1") == 256


def test_other_shapes_fold_by_themselves() -> None:
    notes = {"layers.0.a": "4", "layers.1.a": "4", "layers.2.a": "5", "layers.02.a": "4"}
    assert fold(notes) == ("layers.{0-1}.a 4", "layers.2.a 5", "layers.02.a 4")


PARTS = st.one_of(
    st.integers(0, 12).map(str),
    st.sampled_from(["weight", "layers", "01", "a b", "{1}", "%7B", "größe", ""]),
)
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(NAMES, st.sampled_from(["4", "4x4"]), max_size=30))
def test_folded_names_unfold_to_themselves(notes: dict[str, str]) -> None:
    patterns = [pattern.partition(" ")[::2] for pattern in fold(notes)]
    unfolded = [(name, note) for pattern, note in patterns for name in unfold(pattern)]
    assert len(unfolded) == len(notes) == sum(count(pattern) for pattern, _ in patterns)
    assert dict(unfolded) == notes


def test_folding_is_a_union_of_products() -> None:
    chosen = [pair for pair in itertools.product(range(6), range(6)) if sum(pair) % 3]
    patterns = fold({f"a.{x}.b.{y}": "4" for x, y in chosen})
    names = [name for pattern in patterns for name in unfold(pattern.partition(" ")[0])]
    assert sorted(names) == sorted(f"a.{x}.b.{y}" for x, y in chosen)
