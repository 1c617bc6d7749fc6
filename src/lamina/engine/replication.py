"""Repeat ranges of a model's layers, sharing their weights (`layer_replication`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lamina.config import LoraConfig
from lamina.engine.state import AdapterState
from lamina.errors import TargetError

# Each copy has modules of its own, whoever asks for a million.
_MOST_LAYERS = 4_096
# Where decoders and encoders keep their layers, inside `model` and `bert`: Llama, BERT, Falcon.
_HOMES = ("layers", "encoder.layer", "h")


@dataclass(frozen=True)
class Replication:
    """What a model had before its layers were repeated.

    Attributes:
        holder: the module that holds the list of layers.
        name: the list's name in it.
        layers: the list as it was.
        config: the model's config, if it has one.
        settings: what its config said of the number and types of layers.
    """

    holder: nn.Module
    name: str
    layers: nn.ModuleList
    config: Any
    settings: dict[str, Any]

    def undo(self) -> None:
        """Give the model its own layers back."""
        setattr(self.holder, self.name, self.layers)
        for name, value in self.settings.items():
            setattr(self.config, name, value)


def replicate(model: nn.Module, config: LoraConfig, state: AdapterState) -> Replication | None:
    """Put the layers of all ranges one after the other; None where there is nothing to do.

    The copies share the weights of the layers; adapters will be their own.

    Raises:
        TargetError: the layers can't be found or repeated; nothing has been changed.
    """
    ranges = config.layer_replication
    before = [other.layer_replication for other in state.configs.values()]
    if state.configs and any(_plain(other) != _plain(ranges) for other in before):
        raise TargetError(
            "All adapters of a model have to repeat the same layers.",
            faults=[f"{name!r}: {c.layer_replication}" for name, c in state.configs.items()],
            cure=f"use layer_replication={before[0]!r}",
        )
    if not ranges or state.configs:
        return None
    holder, name = _home(model)
    layers = getattr(holder, name)
    wrong = [pair for pair in ranges if not _within(pair, len(layers))]
    if wrong:
        raise TargetError(
            f"layer_replication names layers that are not there: {wrong}.",
            cure=f"use pairs (start, end) with 0 <= start < end <= {len(layers)}",
        )
    count = sum(end - start for start, end in ranges)
    if count > _MOST_LAYERS:
        raise TargetError(
            f"layer_replication makes {count:,} layers of {len(layers)}.",
            cure=f"repeat fewer: at most {_MOST_LAYERS:,} layers",
        )
    chosen = [index for start, end in ranges for index in range(start, end)]
    settings_of = getattr(holder, "config", None) or getattr(model, "config", None)
    found = Replication(holder, name, layers, settings_of, _settings(settings_of))
    setattr(holder, name, nn.ModuleList(_copy(layers[i], at) for at, i in enumerate(chosen)))
    _set_counts(found, chosen)
    return found


@contextmanager
def replicated(model: nn.Module, config: LoraConfig, state: AdapterState) -> Iterator[None]:
    """`replicate`, undone if anything is raised inside, else left to the state to undo."""
    done = replicate(model, config, state)
    try:
        yield
    except BaseException:
        if done is not None:
            done.undo()
        raise
    state.replication = state.replication or done


def _plain(ranges: Any) -> list[list[int]]:
    return [list(pair) for pair in ranges or ()]


def _within(pair: Sequence[int], count: int) -> bool:
    return len(pair) == 2 and 0 <= pair[0] < pair[1] <= count


def _home(model: Any) -> tuple[nn.Module, str]:
    while isinstance(getattr(model, "model", None), nn.Module):
        model = model.model
    model = getattr(model, "bert", model)
    for home in _HOMES:
        path, _, name = home.rpartition(".")
        holder = getattr(model, path, None) if path else model
        if isinstance(getattr(holder, name, None), nn.ModuleList):
            assert isinstance(holder, nn.Module)
            return holder, name
    raise TargetError(
        "Could not locate the layers attribute in the model, which layer_replication repeats.",
        faults=[f"looked for {', '.join(_HOMES)} in a {type(model).__name__}"],
        cure="leave layer_replication out, or use a model built like Llama, BERT or Falcon",
    )


def _copy(layer: nn.Module, index: int) -> nn.Module:
    # What is in the memo already is shared, not copied.
    made = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    for module in made.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]
    return made


def _settings(config: Any) -> dict[str, Any]:
    names = ("num_hidden_layers", "layer_types")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _set_counts(done: Replication, chosen: Sequence[int]) -> None:
    types = done.settings.get("layer_types")
    if types is not None and len(types) == len(done.layers):
        done.config.layer_types = [types[index] for index in chosen]
    if "num_hidden_layers" in done.settings:
        done.config.num_hidden_layers = len(chosen)
