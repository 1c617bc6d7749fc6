"""What a config's patterns mean among the modules of a file, without the model.

The engine knows it exactly, for a model; here names are all there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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


def hits(patterns: Any, module: str) -> list[str]:
    """The patterns that mean a module: a string as a regular expression, a list by endings."""
    if isinstance(patterns, str):
        found = patterns.lower() == "all-linear" or fullmatch(patterns, module)
        return [patterns] if found else []
    names = as_names(patterns)
    return [name for name in names if module == name or module.endswith(f".{name}")]


def target_hits(config: dict[str, Any], module: str) -> list[str]:
    """The patterns of target_modules and target_parameters by which a module is adapted."""
    name = plain_module(module)
    found = hits(config.get("target_modules"), name)
    parent, _, last = name.rpartition(".")
    if last == "out_proj":
        # An attention's output projection is adapted inside of it.
        found += hits(config.get("target_modules"), parent)
    for pattern in as_names(config.get("target_parameters")):
        owner = pattern.rpartition(".")[0]
        # A parameter's own name isn't in the file.
        if not owner or name == owner or name.endswith(f".{owner}"):
            found.append(pattern)
    return found


def excluded(config: dict[str, Any], module: str) -> bool:
    """Whether exclude_modules means a module."""
    return bool(hits(config.get("exclude_modules"), plain_module(module)))


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
