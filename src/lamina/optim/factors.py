"""Which parameters are factors of adapters, and which A belongs to which B: told by whole names.

A base model, a module or an adapter may have `lora`, `lora_B` or `bias` in its own name, so that
no part of a name says anything unless it is the whole part in the right place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Linear and convolution: lora_A.<adapter>.weight; embedding: lora_embedding_A.<adapter>.
_FACTOR = re.compile(
    r"(?:(?P<layer>.+)\.)?"
    r"(?:lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight"
    r"|lora_embedding_(?P<embedding_side>[AB])\.(?P<embedding_adapter>[^.]+))"
)
_OWNED = re.compile(r"(?:(?P<layer>.+)\.)?lora_\w+\.(?P<adapter>[^.]+)(?:\.\w+)?")


@dataclass(frozen=True)
class Factor:
    """A parameter that is A or B of an adapter.

    Attributes:
        layer: the name of the adapted layer that it lies in.
        adapter: the adapter's name.
        side: "A" or "B".
        embedding: whether the layer is an adapted embedding.
    """

    layer: str
    adapter: str
    side: str
    embedding: bool


@dataclass(frozen=True)
class Pair:
    """The places of an A and its B in a list of names."""

    layer: str
    adapter: str
    a: int
    b: int


def factor(name: str) -> Factor | None:
    """What a parameter's name says, None for all that is no factor."""
    match = _FACTOR.fullmatch(name)
    if match is None:
        return None
    side = match["side"]
    return Factor(
        layer=match["layer"] or "",
        adapter=match["adapter"] or match["embedding_adapter"],
        side=side or match["embedding_side"],
        embedding=side is None,
    )


def owner(name: str) -> tuple[str, str] | None:
    """(layer, adapter) of any parameter that lies in an adapted layer's `lora_*` places."""
    match = _OWNED.fullmatch(name)
    return None if match is None else (match["layer"] or "", match["adapter"])


def pairs(names: Iterable[str]) -> list[Pair]:
    """Every A with its B, in the order in which the Bs are listed."""
    found = {known: i for i, name in enumerate(names) if (known := factor(name)) is not None}
    matched = []
    for b, place in found.items():
        a = found.get(Factor(b.layer, b.adapter, "A", b.embedding))
        if b.side == "B" and a is not None:
            matched.append(Pair(b.layer, b.adapter, a, place))
    return matched
