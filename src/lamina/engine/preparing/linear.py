"""The linear layers that a config means in a model that is not adapted yet."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from lamina.config import LoraConfig
from lamina.engine.layers.linear import is_conv1d
from lamina.engine.names import places
from lamina.engine.targets import make_plan


@dataclass(frozen=True)
class Target:
    """A layer that will be adapted: its plain name, the layer, the adapter's rank there."""

    name: str
    # Any: torch types the attributes of a module as Tensor | Module.
    module: Any
    r: int

    @property
    def stored_across(self) -> bool:
        """Whether its weight lies (in x out)."""
        return is_conv1d(self.module)


def linear_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The linear layers among the targets; embeddings and convolutions are left out.

    Raises:
        TargetError: the targets can't be adapted.
    """
    plain = copy.copy(config)
    # What the initialisation itself needs isn't there yet.
    plain.init_lora_weights = True
    plan = make_plan(model, plain, strict=False)
    originals = {place.name: place.original for place in places(model)}
    return [
        Target(layer.name, originals[layer.name], layer.record.r)
        for layer in plan.layers
        if layer.kind.kind == "linear"
    ]
