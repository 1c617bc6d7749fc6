"""Whose ranks are whose, replayed from a record."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.checkpoint.chain import chain_of, makers_of
from lamina.checkpoint.record import Lamina, Mode, Stage, StageRecord
from lamina.config import LoraConfig


def record(*stages: tuple[str, Mode], laminae: tuple[str, ...], **more: Any) -> StageRecord:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q"]).to_dict()
    return StageRecord(
        stages=tuple(Stage(name=name, mode=mode) for name, mode in stages),
        laminae=tuple(Lamina(stage=name, config=config, ranks={"m": 2}) for name in laminae),
        **more,
    )


@pytest.mark.parametrize("mode", ["stack", "merge"])
def test_continue_trains_the_newest_ranks_and_other_modes_begin_some(mode: Mode) -> None:
    stages: tuple[tuple[str, Mode], ...] = (
        ("a", "fresh"),
        ("b", "continue"),
        ("c", mode),
        ("d", "continue"),
        ("e", "continue"),
    )
    chain = chain_of(record(*stages, laminae=("b", "e")))
    assert [(g.begun_by, g.continued_by) for g in chain.groups] == [
        ("a", ("b",)),
        ("c", ("d", "e")),
    ]
    assert [stage.trained for stage in chain.stages] == [0, 0, 1, 1, 1]


def test_a_chain_that_goes_on_from_an_unknown_origin() -> None:
    chain = chain_of(record(("imported", "fresh"), ("b", "stack"), laminae=("imported", "b")))
    assert [group.begun_by for group in chain.groups] == ["imported", "b"]


def test_where_laminae_are_not_those_of_the_modes_only_the_last_trainer_is_certain() -> None:
    chain = chain_of(record(("a", "fresh"), ("b", "stack"), ("c", "stack"), laminae=("a", "c")))
    assert [stage.trained for stage in chain.stages] == [0, None, 1]
    assert makers_of(
        record(("a", "fresh"), ("b", "stack"), ("c", "stack"), laminae=("a", "c"))
    ) == [
        ("a",),
        ("b", "c"),
    ]
    assert [group.trained_last_by for group in chain.groups] == ["a", "c"]


def test_what_each_stage_left_in_the_file() -> None:
    owners = {"saved_modules": {"head": "b"}, "biases": {"m.bias": "a", "n.bias": "a"}}
    chain = chain_of(record(("a", "fresh"), ("b", "continue"), laminae=("b",), **owners))
    assert [stage.saved_modules for stage in chain.stages] == [(), ("head",)]
    assert [stage.biases for stage in chain.stages] == [("m.bias", "n.bias"), ()]
    assert chain.groups[0].scaling == (3.0,)


def flattened(**more: Any) -> StageRecord:
    """a, b and c as one, with d on top, which e went on training."""
    config = LoraConfig(r=2, target_modules=["q"]).to_dict()
    modes: dict[str, Mode] = {
        "a": "fresh", "b": "stack", "c": "continue", "d": "merge", "e": "continue"
    }  # fmt: skip
    return StageRecord(
        stages=tuple(Stage(name=name, mode=mode) for name, mode in modes.items()),
        laminae=(
            Lamina(stage="c", config=config, ranks={"m": 2}, made_of=("a", "b", "c"), error=0.25),
            Lamina(stage="e", config=config, ranks={"m": 2}),
        ),
        **more,
    )


def test_stages_that_were_put_together() -> None:
    chain = chain_of(flattened(left_out=("z",)))
    assert [stage.trained for stage in chain.stages] == [None, None, 0, 1, 1]
    assert chain.groups[0].made_of == ("a", "b", "c")
    assert chain.groups[0].error == 0.25
    assert [(g.begun_by, g.continued_by) for g in chain.groups] == [("c", ()), ("d", ("e",))]
    assert chain.left_out == ("z",)
    assert makers_of(flattened()) == [("a", "b", "c"), ("d", "e")]


def test_whoever_went_on_with_stages_that_were_put_together() -> None:
    before = flattened()
    whole = before.laminae[0].model_copy(update={"stage": "d"})
    stages = (*before.stages[:3], Stage(name="d", mode="continue"))
    chain = chain_of(StageRecord(stages=stages, laminae=(whole,)))
    assert [stage.trained for stage in chain.stages] == [None, None, 0, 0]
    assert (chain.groups[0].begun_by, chain.groups[0].continued_by) == ("c", ("d",))
