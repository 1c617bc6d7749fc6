"""Targets that mean exactly some modules, told from a file and its record: there is no model.

A name from `target_modules` of an adapter is known to hit nothing in the base but modules that the
adapter has. Of other names that can't be known, so whole names stand in where these don't suffice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from lamina.config import ALL_LINEAR, LoraConfig
from lamina.engine.flat_config import EVERYWHERE
from lamina.engine.names import suffixes


@dataclass(frozen=True)
class Written:
    """A config, and what it is known to have hit.

    Attributes:
        config: of a lamina, or of the whole file.
        modules: plain names of the modules that it adapted.
        whole: plain names of the modules that it trained whole; inside of them it hits nothing.
    """

    config: LoraConfig
    modules: frozenset[str]
    whole: frozenset[str]


def targets_of(
    wanted: Collection[str], whole: Collection[str], written: Collection[Written]
) -> dict[str, Any]:
    """The fields of a config that say which modules are adapted.

    Args:
        wanted: plain names of the modules.
        whole: plain names of those that are trained whole beside them.
        written: configs that are known to mean what they mean.
    """
    names = set(wanted)
    known = [each for each in written if each.whole <= set(whole)]
    same = next((each for each in known if each.modules == names and _says_all(each)), None)
    if same is not None:
        fields = ("target_modules", *EVERYWHERE)
        return {field: getattr(same.config, field) for field in fields}
    endings = {ending for each in known for ending in _endings(each) if _hit(each, ending) <= names}
    covered = {name for name in names if endings & {*suffixes(name)}}
    short = {e for e in endings if not any(o in endings for o in suffixes(e) if o != e)}
    spelt = {*short, *(names - covered)}
    everything = {module for each in written for module in each.modules}
    if any(spelt & {*suffixes(name)} for name in everything - names):
        # A whole name on which another one ends.
        return {"target_modules": "|".join(map(re.escape, sorted(names))), **EVERYWHERE}
    return {"target_modules": spelt, **EVERYWHERE}


def _says_all(each: Written) -> bool:
    """Whether the config alone says what it hits, whatever else the model has."""
    targets = each.config.target_modules
    if isinstance(targets, str):
        return targets.lower() != ALL_LINEAR
    return bool(targets)


def _endings(each: Written) -> Iterator[str]:
    config = each.config
    narrowed = any(getattr(config, field) is not None for field in EVERYWHERE)
    if not narrowed and isinstance(config.target_modules, (set, list)):
        yield from config.target_modules


def _hit(each: Written, ending: str) -> set[str]:
    return {module for module in each.modules if ending in suffixes(module)}
