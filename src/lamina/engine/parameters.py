"""Find parameters that are adapted by themselves, such as fused experts. Touches nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lamina.engine.layers import LoraLayer, ParamWrapper, layer_class
from lamina.engine.names import Place, suffixes


@dataclass(frozen=True)
class ParameterHit:
    """A parameter that patterns mean.

    Attributes:
        place: its module.
        parameter: its name in the module.
        patterns: those that mean it, the most precise first.
    """

    place: Place
    parameter: str
    patterns: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its plain name in the model."""
        return f"{self.place.name}.{self.parameter}" if self.place.name else self.parameter


def find_parameters(everything: Iterable[Place], targets: Collection[str]) -> list[ParameterHit]:
    """The parameters whose names, or the ends of them, are in `targets`; each once."""
    hits = []
    seen: set[int] = set()
    for place in everything if targets else ():
        if id(place.original) in seen:
            continue
        seen.add(id(place.original))
        for name, _ in own_parameters(place.original):
            whole = f"{place.name}.{name}" if place.name else name
            patterns = tuple(ending for ending in suffixes(whole) if ending in targets)
            if patterns:
                hits.append(ParameterHit(place, name, patterns))
    return hits


def own_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that a module itself holds, by the names that its code reads them by."""
    yield from module.named_parameters(recurse=False)
    parametrized = module._modules.get("parametrizations")
    for name, steps in () if parametrized is None else parametrized._modules.items():
        original = getattr(steps, "original", None)
        if isinstance(original, torch.Tensor):
            yield name, original


def why_not(hit: ParameterHit, adapted: Collection[str]) -> str | None:
    """Why a parameter can't be adapted by itself, or None.

    Args:
        hit: the parameter.
        adapted: plain names of the modules that the same adapter adapts.
    """
    place = hit.place
    if not place.name:
        return (
            "Targeting an nn.Parameter on the top-level module is not supported "
            f"(parameter '{hit.parameter}')"
        )
    foreign = isinstance(place.module, LoraLayer) and not isinstance(place.module, ParamWrapper)
    if foreign or place.name in adapted:
        return (
            f"{hit.name}: Trying to wrap an `nn.Parameter` of layer '{place.name}' of type "
            f"{type(place.original).__name__}, which is not a valid target. It is adapted as a "
            "module; take it out of target_modules, or out of target_parameters"
        )
    ndim = dict(own_parameters(place.original))[hit.parameter].ndim
    if ndim not in (2, 3):
        return f"{hit.name} has {ndim} dimensions; 2 or 3 can be adapted"
    return None


def skipped_experts(everything: Iterable[Place], hits: Iterable[ParameterHit]) -> list[str]:
    """Plain names of expert parameters that no pattern means."""
    taken = {hit.name for hit in hits}
    found = []
    for place in everything:
        module = place.original
        if not _is_experts(place) or layer_class(module) is not None:
            continue
        found += [
            f"{place.name}.{name}"
            for name, parameter in own_parameters(module)
            if parameter.ndim == 3 and f"{place.name}.{name}" not in taken
        ]
    return found


def _is_experts(place: Place) -> bool:
    words = f"{place.name.rpartition('.')[2]} {type(place.original).__name__}".lower()
    return bool(place.name) and ("expert" in words or hasattr(place.original, "num_experts"))


def endings(names: Iterable[str]) -> list[str]:
    """What to give as `target_parameters` for these: the last two components, each once."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})
