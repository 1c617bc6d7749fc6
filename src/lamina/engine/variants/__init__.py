"""How an adapter's low-rank update is combined with the base: a variant for each method.

`variant_for` asks the registered variants which of them a config means; plain LoRA is what is
left. A variant knows the layer's update and the base's output or weight, never a quantiser.
"""

from __future__ import annotations

from collections.abc import Callable

from lamina.config import LoraConfig
from lamina.engine.variants.base import Variant
from lamina.engine.variants.plain import PlainLora

__all__ = ["PlainLora", "Variant", "register", "variant_for"]

_VARIANTS: list[tuple[Callable[[LoraConfig], bool], Variant]] = []
_PLAIN = PlainLora()


def register(means: Callable[[LoraConfig], bool], variant: Variant) -> None:
    """Use `variant` for every config for which `means(config)` is true."""
    _VARIANTS.append((means, variant))


def variant_for(config: LoraConfig) -> Variant:
    """The variant that a config means."""
    return next((variant for means, variant in _VARIANTS if means(config)), _PLAIN)
