"""Targets told from a file: they mean the modules that are wanted, whatever else a model has."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.config import LoraConfig
from lamina.stages.narrowing import Written, targets_of

LAYERS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q", "k", "mlp.up")]


def hits(fields: dict[str, object], names: list[str]) -> set[str]:
    """What peft takes the targets to mean, written from its documentation."""
    targets = fields["target_modules"]
    if isinstance(targets, str):
        return {name for name in names if re.fullmatch(targets, name)}
    assert isinstance(targets, set)
    return {n for n in names if n in targets or any(n.endswith(f".{t}") for t in targets)}


def written(modules: list[str], whole: frozenset[str] = frozenset(), **changes: object) -> Written:
    return Written(LoraConfig(**changes), frozenset(modules), whole)


def test_names_of_a_config_that_hit_nothing_else() -> None:
    file = written(LAYERS, target_modules=["q", "k", "up"])
    wanted = [name for name in LAYERS if not name.endswith("k")]
    assert targets_of(wanted, (), [file])["target_modules"] == {"q", "up"}


def test_whole_names_where_an_ending_says_too_much() -> None:
    file = written(LAYERS, target_modules=["q", "k"])
    wanted = ["layers.0.q", "layers.0.k", "layers.1.k"]
    assert targets_of(wanted, (), [file])["target_modules"] == {"layers.0.q", "k"}


def test_a_config_that_hits_just_that_is_kept() -> None:
    pattern = r"layers\.1\.(q|k)"
    lamina = written(["layers.1.q", "layers.1.k"], target_modules=pattern, exclude_modules=["x"])
    fields = targets_of(["layers.1.k", "layers.1.q"], (), [lamina])
    assert fields["target_modules"] == pattern
    assert fields["exclude_modules"] == {"x"}


def test_all_linear_is_spelt_out() -> None:
    file = written(LAYERS, target_modules="all-linear")
    assert targets_of(LAYERS, (), [file])["target_modules"] == set(LAYERS)


def test_a_config_is_not_believed_where_modules_that_it_trained_whole_are_gone() -> None:
    file = written(["a.q"], whole=frozenset({"b"}), target_modules=["q"])
    assert targets_of(["a.q"], (), [file])["target_modules"] == {"a.q"}
    assert targets_of(["a.q"], ("b",), [file])["target_modules"] == {"q"}


def test_a_whole_name_that_another_ends_on() -> None:
    file = written(["up", "block.up"], target_modules="up|block.up")
    fields = targets_of(["up"], (), [file])
    assert hits(fields, ["up", "block.up"]) == {"up"}


@settings(max_examples=60, deadline=None)
@given(
    split=st.lists(st.sampled_from(LAYERS), unique=True, min_size=1),
    wanted=st.sets(st.sampled_from(LAYERS), min_size=1),
)
def test_it_is_always_just_what_is_wanted(split: list[str], wanted: set[str]) -> None:
    everything = written(LAYERS, target_modules=["q", "k", "up"])
    some = written(split, target_modules=list(split))
    fields = targets_of(wanted, (), [everything, some])
    assert hits(fields, LAYERS) == wanted
