"""The ways to combine adapters: a row each.

- `cat`: the update, exactly, by ranks side by side.
- `svd`: the best approximation of the update that has the rank.
- `linear`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`: A and B, each for itself.
- the last four with `_svd`: the update entry by entry, then as `svd`.

Merging A and B each for itself, with the root of weight times scaling on both, gives the products
of every A with every other B too: it is a rough approximation of the sum. It is there because
peft has it, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lamina.engine.combine.arithmetic import (
    agreed_sum,
    keep_largest,
    keep_random,
    weighted_sum,
)
from lamina.errors import ConfigError, nearest


@dataclass(frozen=True)
class Settings:
    """The numbers that methods take.

    Attributes:
        rank: of the result, for methods that end in a decomposition; None takes the largest rank
            among the parts.
        density: the share of entries that is kept, from above 0 to 1.
        majority: how TIES elects a sign: "total" or "frequency".
        clamp: factors are clamped to plus and minus this quantile of their entries.
        driver: the cuSOLVER routine of decompositions on CUDA.
    """

    rank: int | None = None
    density: float | None = None
    majority: str = "total"
    clamp: float | None = None
    driver: str | None = None


Merge = Callable[[Sequence[torch.Tensor], Sequence[float], Settings], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A way to combine.

    Attributes:
        name: its name in calls.
        on: what it merges: "ranks" side by side, "factors" A and B each for itself, or "update".
        merge: how tensors of one shape become one.
        takes_density: whether it keeps a share of the entries only.
    """

    name: str
    on: str
    merge: Merge
    takes_density: bool = False


def _linear(tensors: Sequence[torch.Tensor], weights: Sequence[float], _: Settings) -> torch.Tensor:
    return weighted_sum(tensors, weights)


def _ties(tensors: Sequence[torch.Tensor], weights: Sequence[float], how: Settings) -> torch.Tensor:
    kept = [keep_largest(tensor, how.density or 1) for tensor in tensors]
    return agreed_sum(kept, weights, how.majority)


def _dare_linear(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], how: Settings
) -> torch.Tensor:
    return weighted_sum([keep_random(tensor, how.density or 1) for tensor in tensors], weights)


def _dare_ties(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], how: Settings
) -> torch.Tensor:
    kept = [keep_random(tensor, how.density or 1) for tensor in tensors]
    return agreed_sum(kept, weights, how.majority)


def _magnitude_prune(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], how: Settings
) -> torch.Tensor:
    return weighted_sum([keep_largest(tensor, how.density or 1) for tensor in tensors], weights)


METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known by its name."""
    METHODS[method.name] = method


register(Method("cat", "ranks", _linear))
register(Method("svd", "update", _linear))
register(Method("linear", "factors", _linear))
for _name, _merge in {
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
    "magnitude_prune": _magnitude_prune,
}.items():
    register(Method(_name, "factors", _merge, takes_density=True))
    register(Method(f"{_name}_svd", "update", _merge, takes_density=True))


def method_of(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        close = nearest(str(name), METHODS)
        raise ConfigError(
            f"Invalid combination_type: {name!r} is no way to combine adapters."
            + (f" Did you mean {close[0]!r}?" if close else ""),
            cure=f"choose one of {', '.join(METHODS)}",
        )
    return METHODS[name]
