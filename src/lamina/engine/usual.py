"""What is usually adapted, for configs that don't say."""

from __future__ import annotations

from collections.abc import Iterable

# What is usual, by the names that an architecture's attention has; the first that fits is taken.
_USUAL_TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
    ("qkv",),
    ("q", "v"),
    ("q_lin", "v_lin"),
    ("to_q", "to_v"),
)


def usual_targets(names: Iterable[str]) -> tuple[str, ...]:
    """The names usually adapted in an architecture: its query and value projections."""
    leaves = {name.rpartition(".")[2] for name in names}
    return next((usual for usual in _USUAL_TARGETS if leaves.issuperset(usual)), ())
