"""What peft's `lora_magnitude_vector` holds, under its names."""

from __future__ import annotations

from lamina.engine.variants.dora_norm import Magnitude
from lamina.interop.peft.standing import StandsFor

# Read by nobody here: `DoraCaching` is the switch.
ENABLE_DORA_CACHING = False


class DoraLinearLayer(metaclass=StandsFor):
    """A magnitude; in Lamina one class serves all kinds of layers."""

    stands_for = Magnitude


class DoraEmbeddingLayer(metaclass=StandsFor):
    """The magnitude of an embedding."""

    stands_for = Magnitude


class DoraConv1dLayer(metaclass=StandsFor):
    """The magnitude of a convolution."""

    stands_for = Magnitude


class DoraConv2dLayer(metaclass=StandsFor):
    """The magnitude of a convolution."""

    stands_for = Magnitude


class DoraConv3dLayer(metaclass=StandsFor):
    """The magnitude of a convolution."""

    stands_for = Magnitude
