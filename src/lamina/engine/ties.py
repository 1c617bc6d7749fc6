"""Modules that share one weight, and what that means for adapters on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.engine.layers import LoraLayer
from lamina.engine.names import Place, unadapted


def tied_to_embedding(model: nn.Module, everything: Iterable[Place]) -> tuple[str, ...]:
    """Plain names of the modules that share the input embedding's weight, the embedding first.

    Empty if none does, or if the model's config says that they are not tied.
    """
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None) is False:
        return ()
    getter = getattr(unadapted(model), "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        return ()
    everything = list(everything)
    source = next((p for p in everything if _is(p, embedding)), None)
    if source is None:
        return ()
    for group in sharing(everything):
        if any(place.original is source.original for place in group):
            others = [place.name for place in group if place.original is not source.original]
            return (source.name, *others) if others else ()
    return ()


def input_embedding(model: nn.Module, everything: Iterable[Place]) -> str | None:
    """Plain name of the input embedding; None if the model doesn't tell."""
    getter = getattr(unadapted(model), "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    return next((place.name for place in everything if _is(place, embedding)), None)


def _is(place: Place, module: object) -> bool:
    return module is not None and (place.module is module or place.original is module)


def sharing(everything: Iterable[Place]) -> list[list[Place]]:
    """The places whose modules, different ones, hold the very same weight; a list for each."""
    holders: dict[int, list[Place]] = defaultdict(list)
    for place in everything:
        weight = place.original._parameters.get("weight")
        if weight is not None and all(
            p.original is not place.original for p in holders[id(weight)]
        ):
            holders[id(weight)].append(place)
    return [group for group in holders.values() if len(group) > 1]


Work = list[tuple[str, LoraLayer, list[str]]]


@dataclass(frozen=True)
class SharedFolds:
    """What becomes of layers whose weight other modules hold too.

    Attributes:
        refused: id of a module -> why its weight can't be changed alone.
        sources: id of a layer -> the layer over the same weight whose fold is its own too.
    """

    refused: dict[int, str]
    sources: dict[int, LoraLayer]


def shared_folds(everything: Iterable[Place], work: Work) -> SharedFolds:
    """Judge the folds of `work` in weights that several modules share.

    Where all of these modules are adapted, and their adapters are tied, one sum is right for all.
    """
    by_module: dict[int, list[tuple[LoraLayer, list[str]]]] = defaultdict(list)
    for _, layer, missing in work:
        by_module[id(layer.get_base_layer())].append((layer, missing))
    refused: dict[int, str] = {}
    sources: dict[int, LoraLayer] = {}
    for group in sharing(everything):
        here = [by_module.get(id(place.original), []) for place in group]
        if not any(here):
            continue
        tied = _tied_folds(here)
        if tied is not None:
            sources.update(tied)
            continue
        for place in group:
            other = next(p for p in group if p is not place)
            refused[id(place.original)] = (
                f"its weight is tied to {other.name}, which it would change too"
            )
    return SharedFolds(refused, sources)


def _tied_folds(
    here: list[list[tuple[LoraLayer, list[str]]]],
) -> dict[int, LoraLayer] | None:
    """id of each layer that follows another -> that one; None if they would differ."""
    own = [
        [(layer, names) for layer, names in layers if _source(layer, names) is None]
        for layers in here
    ]
    first = next((layers for layers in own if layers), [])
    if sum(map(bool, own)) != 1:
        return None
    found: dict[int, LoraLayer] = {}
    for layers in here:
        if layers and _source(*layers[0]) is None:
            continue
        for source, names in first:
            follower = next(
                (other for other, n in layers if n == names and _source(other, n) is source),
                None,
            )
            if follower is None:
                return None
            found[id(follower)] = source
        if len(layers) != len(first):
            return None
    return found


def _source(layer: LoraLayer, names: list[str]) -> LoraLayer | None:
    """The layer whose adapters of these names a layer shares; None if they are its own."""
    found = {id(source): source for source in map(layer.source_of, names)}
    return next(iter(found.values())) if len(found) == 1 else None


@torch.no_grad()
def untie(model: nn.Module, everything: Iterable[Place]) -> Callable[[], None]:
    """Give every module that shares a weight one of its own, and say so in the model's config.

    Returns:
        What ties them again.
    """
    everything = list(everything)
    config: Any = getattr(model, "config", None)
    told = bool(tied_to_embedding(model, everything)) and hasattr(config, "tie_word_embeddings")
    before = [(p.original, p.original.weight) for group in sharing(everything) for p in group[1:]]
    for module, weight in before:
        assert isinstance(weight, nn.Parameter)
        module.weight = nn.Parameter(weight.clone(), weight.requires_grad)
    if told:
        config.tie_word_embeddings = False

    def tie_again() -> None:
        for module, weight in before:
            module.weight = weight
        if told:
            config.tie_word_embeddings = True

    return tie_again
