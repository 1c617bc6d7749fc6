"""Whose ranks are whose, replayed from a record."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.checkpoint.chain import chain_of
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
    assert [group.trained_last_by for group in chain.groups] == ["a", "c"]


def test_what_each_stage_left_in_the_file() -> None:
    owners = {"saved_modules": {"head": "b"}, "biases": {"m.bias": "a", "n.bias": "a"}}
    chain = chain_of(record(("a", "fresh"), ("b", "continue"), laminae=("b",), **owners))
    assert [stage.saved_modules for stage in chain.stages] == [(), ("head",)]
    assert [stage.biases for stage in chain.stages] == [("m.bias", "n.bias"), ()]
    assert chain.groups[0].scaling == (3.0,)
