"""Which tensors of a model the tensors in its files become.

transformers renames tensors when it loads them, and fuses some, such as the experts of a layer.
What it does is taken from its own tables; what can't be undone exactly is told as a reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Unit:
    """Tensors of the files that become tensors of the model together.

    Attributes:
        keys: their names in the files.
        names: their names in the model.
        load: what is in the files -> what is in the model; None where they are the same.
        save: the way back.
        experts: where it is a stack of experts that lie apart in the files, what each of them is
            by itself: a stack of one.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    load: Callable[[Tensors], Tensors] | None = None
    save: Callable[[Tensors], Tensors] | None = None
    experts: tuple[Unit, ...] = ()


@dataclass(frozen=True)
class Naming:
    """How the files and a model name the same tensors.

    Attributes:
        units: for all that the model takes from the files.
        unused: names in the files that the model has no place for.
        missing: names in the model that no file has, tied ones included.
        faults: why something can't be followed.
    """

    units: tuple[Unit, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the model names all as the files do."""
        return all(unit.keys == unit.names for unit in self.units)


def naming(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Naming:
    """Match the files of a checkpoint with a model that is on the meta device.

    Args:
        model: as transformers builds it.
        shapes: name in the files -> shape.
    """
    state: Mapping[str, torch.Tensor] = model.state_dict()
    plain: dict[str, str] = {}
    fused: dict[str, list[tuple[str, str]]] = defaultdict(list)
    unused: list[str] = []
    conversions = _conversions(model)
    for key, name, pattern in _renamed(model, sorted(shapes, key=_natural), state, conversions):
        if name not in state:
            unused.append(key)
        elif pattern is None:
            plain[key] = name
        else:
            fused[name].append((key, pattern))
    faults = _collisions(plain, fused)
    units = [Unit((key,), (name,)) for key, name in plain.items()]
    if fused:
        # What was matched is what has to be undone.
        model._weight_conversions = [each for each in conversions if each.was_used()]
    for name, sources in fused.items():
        unit, fault = _fused(model, name, sources, conversions, shapes)
        if unit is None:
            faults.append(fault)
        else:
            units.append(unit)
    here = {name for unit in units for name in unit.names}
    # Of those that aren't in the files, buffers that are computed count too.
    missing = tuple(name for name in state if name not in here)
    return Naming(tuple(units), tuple(unused), missing, tuple(faults))


def _conversions(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model) or ())


def _natural(key: str) -> Any:
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(key)


def _renamed(
    model: Any, keys: list[str], state: Mapping[str, torch.Tensor], conversions: list[Any]
) -> Iterator[tuple[str, str, str | None]]:
    """(name in the files, name in the model, what of a conversion has matched)."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, dict(state))
        if name not in state and key in state:
            name, pattern = key, None
        yield key, name, pattern


def _collisions(plain: dict[str, str], fused: Mapping[str, Any]) -> list[str]:
    by_name: dict[str, list[str]] = defaultdict(list)
    for key, name in plain.items():
        by_name[name].append(key)
    return [
        f"{' and '.join(keys)} are both {name} in the model"
        for name, keys in by_name.items()
        if len(keys) > 1 or name in fused
    ]


def _fused(
    model: Any,
    name: str,
    sources: list[tuple[str, str]],
    conversions: list[Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Unit | None, str]:
    """The unit of one conversion, if going there and back gives what was there."""
    unit = _unit(model, name, sources, conversions)
    inside, fault = _there_and_back(unit, shapes)
    if inside is None:
        return None, f"{name} {fault}"
    state = model.state_dict()
    if any(state[n].shape != tensor.shape for n, tensor in inside.items()):
        return None, f"{name} has another shape in the model"
    experts = _experts(model, name, sources, conversions)
    if any(_there_and_back(expert, shapes)[0] is None for expert in (*experts[:1], *experts[-1:])):
        experts = ()
    return replace(unit, names=tuple(inside), experts=experts), ""


def _unit(
    model: Any,
    name: str,
    sources: list[tuple[str, str]],
    conversions: list[Any],
    saved_as: Mapping[str, str] | None = None,
) -> Unit:
    """What a conversion makes of these tensors; some may come back under other names."""
    called = saved_as or {}

    def load(tensors: Tensors) -> Tensors:
        converter = deepcopy(_converter(conversions, sources[0][1]))
        for key, pattern in sources:
            converter.add_tensor(name, key, pattern, _given(tensors[key]))
        made = converter.convert(name, model=model, config=model.config)
        return {
            target: value[0] if isinstance(value, list) else value for target, value in made.items()
        }

    def save(tensors: Tensors) -> Tensors:
        from transformers.core_model_loading import revert_weight_conversion

        back: Tensors = revert_weight_conversion(model, dict(tensors))
        return {called.get(key, key): tensor for key, tensor in back.items()}

    return Unit(tuple(key for key, _ in sources), (name,), load, save)


def _there_and_back(
    unit: Unit, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensors | None, str]:
    """(what is in the model, why that isn't saved as it was loaded), on the meta device."""
    assert unit.load is not None
    assert unit.save is not None
    before = {key: torch.empty(shapes[key], device="meta") for key in unit.keys}
    try:
        inside = unit.load(before)
        after = unit.save(inside)
    except Exception as error:
        # transformers' operations raise whatever they raise.
        return None, f"can't be taken apart again: {error or type(error).__name__}"
    if {k: v.shape for k, v in after.items()} != {k: v.shape for k, v in before.items()}:
        return None, "isn't saved as it was loaded"
    return inside, ""


def _experts(
    model: Any, name: str, sources: list[tuple[str, str]], conversions: list[Any]
) -> tuple[Unit, ...]:
    """Each expert by itself, where experts are stacked and nothing is done across them."""
    first, *others = _converter(conversions, sources[0][1]).operations
    stacks = type(first).__name__ == "MergeModulelist" and first.dim == 0
    if not stacks or any(type(o).__name__ != "Concatenate" or o.dim == 0 for o in others):
        return ()
    by_pattern: dict[str, list[str]] = defaultdict(list)
    for key, pattern in sources:
        by_pattern[pattern].append(key)
    if len({len(keys) for keys in by_pattern.values()}) != 1:
        return ()
    patterns, columns = list(by_pattern), list(zip(*by_pattern.values(), strict=True))
    return tuple(
        _unit(
            model,
            name,
            list(zip(keys, patterns, strict=True)),
            conversions,
            # Alone, it comes back as the first.
            dict(zip(columns[0], keys, strict=True)),
        )
        for keys in columns
    )


def _converter(conversions: list[Any], pattern: str) -> Any:
    found = [c for c in conversions if hasattr(c, "operations") and pattern in c.source_patterns]
    return found[-1]


def _given(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor
