"""The shortest names that mean exactly some modules of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lamina.engine.linears import linear_names
from lamina.engine.names import Place, places, suffixes


def find_all_linear_names(model: nn.Module, *, include_head: bool = False) -> list[str]:
    """The names to give as `target_modules` to adapt every linear layer.

    The shortest endings that mean linear layers and nothing else, sorted. On an adapted model they
    are the original names, never an adapter's internals. Quantised linears and `Conv1D` count.
    A whole name on which something else ends too (`2` beside `block.2`) can't be told apart by any
    list; there "all-linear" is the way.

    Args:
        model: any module, plain or adapted.
        include_head: also name the output head (a language model's or a classifier's).
    """
    everything = list(places(model))
    return spell(everything, set(linear_names(everything, model, include_head=include_head)))


def spell(everything: Iterable[Place], wanted: set[str]) -> list[str]:
    """The shortest endings that mean exactly the modules in `wanted`, sorted."""
    others = [place.name for place in everything if place.name and place.name not in wanted]
    taken = {suffix for name in others for suffix in suffixes(name)}
    short = {_shortest(name, taken) for name in wanted}
    return sorted(name for name in short if not _covered(name, short))


def spell_saved(everything: Iterable[Place], saved: Iterable[str]) -> list[str]:
    """The names for `modules_to_save` that mean these modules to every reader, sorted.

    A reader that takes "norm" for the end of "input_layernorm" too gets whole names.
    """
    everything, wanted = list(everything), set(saved)
    short = spell(everything, wanted)
    hit = {place.name for place in everything if place.name.endswith(tuple(short))}
    return short if hit <= wanted else sorted(wanted)


def _shortest(name: str, taken: set[str]) -> str:
    endings = [ending for ending in suffixes(name) if ending not in taken]
    return endings[-1] if endings else name


def _covered(name: str, others: set[str]) -> bool:
    return any(ending in others for ending in suffixes(name) if ending != name)
