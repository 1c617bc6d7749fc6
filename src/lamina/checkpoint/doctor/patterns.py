"""What a config's patterns mean among the modules of a file, without the model.

The engine knows it exactly, for a model; here names are all there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lamina.config.expressions import fullmatch, why_not
from lamina.config.patterns import in_layers

# Where layers are if the config doesn't say.
_LAYERS = (
    r".*?\.[^.]*\.(?P<lamina_index>\d+)\.",
    r"[^.]*\.(?P<lamina_index>\d+)\.",
)
_INNER = {"base_layer", "token_adapter"}


def plain_module(module: str) -> str:
    """A module's name in the base, without the parts that adapters put in."""
    return ".".join(part for part in module.split(".") if part not in _INNER)


def as_names(value: Any) -> list[str]:
    """A field that holds names: a string is one."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(each) for each in value]


class Names:
    """Patterns for modules: a string is a regular expression, a list means names by their ends."""

    def __init__(self, value: Any) -> None:
        self._expression = value if isinstance(value, str) else None
        self._names = frozenset(() if isinstance(value, str) else as_names(value))

    def hits(self, module: str) -> list[str]:
        """The patterns that mean a module, by its name in the base."""
        if self._expression is not None:
            every = self._expression.lower() == "all-linear"
            found = every or fullmatch(self._expression, module)
            return [self._expression] if found else []
        return [ending for ending in _endings(module) if ending in self._names]


def _endings(name: str) -> Iterator[str]:
    while name:
        yield name
        _, _, name = name.partition(".")


class Targets:
    """What a config adapts: target_modules, target_parameters, without exclude_modules."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._modules = Names(config.get("target_modules"))
        self._excluded = Names(config.get("exclude_modules"))
        parameters = as_names(config.get("target_parameters"))
        # A parameter's own name isn't in the file.
        self._owners: dict[str, list[str]] = {}
        for each in parameters:
            self._owners.setdefault(each.rpartition(".")[0], []).append(each)

    def hits(self, module: str) -> list[str]:
        """The patterns by which a module of the file is adapted."""
        name = plain_module(module)
        found = self._modules.hits(name)
        parent, _, last = name.rpartition(".")
        if last == "out_proj":
            # An attention's output projection is adapted inside of it.
            found += self._modules.hits(parent)
        for owner in ("", *_endings(name)) if self._owners else ():
            found += self._owners.get(owner, [])
        return found

    def excluded(self, module: str) -> bool:
        """Whether exclude_modules means a module."""
        return bool(self._excluded.hits(plain_module(module)))


def layer_of(config: dict[str, Any], module: str) -> int | None:
    """The index of the layer that a module lies in, as layers_to_transform means it."""
    name = plain_module(module)
    patterns = [in_layers(each) for each in as_names(config.get("layers_pattern"))]
    for expression in patterns or _LAYERS:
        usable = why_not(expression, with_groups=True) is None
        found = re.match(expression, name) if usable else None
        if found:
            return int(found["lamina_index"])
    return None


def wanted_layers(config: dict[str, Any]) -> list[int]:
    """layers_to_transform as a list; empty for all."""
    value = config.get("layers_to_transform")
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(each) for each in value]


def silent(patterns: Iterable[str], found: Iterable[str]) -> list[str]:
    """The patterns that were not found, in their order."""
    seen = set(found)
    return [pattern for pattern in patterns if pattern not in seen]
