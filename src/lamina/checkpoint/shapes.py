"""The adapted modules of a file, by the names and shapes in its headers; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lamina.checkpoint.origin import A_LEAVES, B_LEAVES, split_key
from lamina.config.patterns import first_match
from lamina.config.readable import numbers_hold

# No layer has a number as long.
_DIGITS = 20


@dataclass(frozen=True)
class FactorShapes:
    """A and B of one module, as a file has them.

    Attributes:
        module: plain name of the module.
        keys: names of A and B in the file.
        shape_A: (r, in, ...); of an embedding (r, rows).
        shape_B: (out, r, ...).
    """

    module: str
    keys: tuple[str, str]
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.shape_A[0]

    @property
    def shape(self) -> str:
        """Features in and out, and the kernel if there is one: `32 → 64`, `3 → 8, kernel 3x3`."""
        text = f"{self.shape_A[1]} → {self.shape_B[0]}"
        kernel = self.shape_A[2:]
        return f"{text}, kernel {'x'.join(map(str, kernel))}" if kernel else text

    @property
    def parameters(self) -> int:
        """Entries of A and B."""
        return math.prod(self.shape_A) + math.prod(self.shape_B)

    @property
    def group(self) -> str:
        """What modules of its kind are called, see `kind_of`."""
        return kind_of(self.module)


def kind_of(module: str) -> str:
    """What modules of this kind are called: the last component, with the one before a number."""
    # Where several parameters of a module are adapted, one wrapper lies in the other.
    parts = [part for part in module.split(".") if part != "base_layer"]
    first = next((i for i in range(len(parts) - 1, 0, -1) if not parts[i].isdigit()), 0)
    return ".".join(parts[first:])


def find_factors(header: Mapping[str, Mapping[str, Any]]) -> tuple[list[FactorShapes], list[str]]:
    """The adapted modules in the file's order, and a line for each that is not whole."""
    halves: dict[str, dict[str, str]] = {}
    for key in header:
        module, leaf = split_key(key)
        if leaf in (*A_LEAVES, *B_LEAVES):
            halves.setdefault(module, {})["A" if leaf in A_LEAVES else "B"] = key
    found, faults = [], []
    for module, keys in sorted(halves.items(), key=lambda item: natural_order(item[0])):
        missing = {"A", "B"} - keys.keys()
        if missing:
            faults.append(f"{module} has no {'AB'.strip(''.join(keys))}")
            continue
        shapes = [tuple(header[keys[side]]["shape"]) for side in "AB"]
        if shapes[0][:1] == (0,) and shapes[1][1:2] == (0,):
            # All ranks were taken away.
            continue
        if not fit_together(*shapes):
            faults.append(f"{module} has factors of the shapes {shapes[0]} and {shapes[1]}")
            continue
        found.append(FactorShapes(module, (keys["A"], keys["B"]), shapes[0], shapes[1]))
    return found, faults


def fit_together(shape_A: tuple[int, ...], shape_B: tuple[int, ...]) -> bool:
    """Whether the ranks of A are those of B, or those of one of its groups times their number."""
    if min(len(shape_A), len(shape_B)) < 2:
        return False
    return shape_A[0] > 0 and shape_B[1] > 0 and shape_A[0] % shape_B[1] == 0


def scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> tuple[float, ...]:
    """The different scalings of modules; none if the config's numbers aren't to be relied on.

    Args:
        config: the values of a config, unchecked.
        ranks: plain module name -> its rank.
    """
    if not numbers_hold(config):
        return ()
    return tuple(sorted({scaling_in(config, *item) for item in ranks.items()}))


def scaling_in(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`alpha / r` of a module by its config's patterns, or `alpha / sqrt(r)` with rsLoRA."""
    if config.get("peft_type") == "ADALORA":
        # Ranks that were taken away leave the scaling as it was.
        return float(config.get("lora_alpha", 8)) / float(config.get("init_r", 12))
    module = module.replace(".base_layer", "")
    alpha = first_match(
        config.get("alpha_pattern") or {}, module, float(config.get("lora_alpha") or 8)
    )
    if config.get("target_parameters"):
        # Each expert has ranks of its own; the file has them of all in one factor.
        each = int(first_match(config.get("rank_pattern") or {}, module, config.get("r") or 8))
        rank = rank if rank % each else each
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def group_by_kind(factors: Iterable[FactorShapes]) -> dict[str, list[FactorShapes]]:
    """`FactorShapes.group` -> its members, in order of appearance."""
    groups: dict[str, list[FactorShapes]] = {}
    for each in factors:
        groups.setdefault(each.group, []).append(each)
    return groups


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, in which layer 10 comes after layer 9."""
    return [
        (int(part), "") if part.isdecimal() and len(part) < _DIGITS else (-1, part)
        for part in name.split(".")
    ]
