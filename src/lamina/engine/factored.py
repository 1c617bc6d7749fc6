"""The adapted layers whose update comes from two factors, A and B."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lamina.engine.layers import LoraLayer
from lamina.engine.names import adapted_layers

# A layer that replaces rows has none; one over a parameter stacks those of all experts.
_OTHERS = ("tokens", "experts")


def factored_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The layers with A and B, by their plain names; a layer used twice comes once."""
    for name, layer in adapted_layers(model):
        if layer.kind not in _OTHERS:
            yield name, layer
