"""How an adapter's low-rank update is combined with the base: a variant for each method.

`variant_for` asks the registered variants which of them a config means; plain LoRA is what is
left. A variant knows the layer's update and the base's output or weight, never a quantiser.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from lamina.config import LoraConfig
from lamina.engine.variants.adalora import AdaLora, is_adalora
from lamina.engine.variants.alora import ALora
from lamina.engine.variants.arrow import Arrow
from lamina.engine.variants.base import Variant
from lamina.engine.variants.bdlora import BdLora
from lamina.engine.variants.dora import Dora
from lamina.engine.variants.kasa import Kasa
from lamina.engine.variants.mica import MicaLora, is_mica
from lamina.engine.variants.monteclora import Monteclora
from lamina.engine.variants.plain import PlainLora
from lamina.engine.variants.qalora import QALora
from lamina.engine.variants.velora import Velora

__all__ = [
    "ALora",
    "AdaLora",
    "Arrow",
    "BdLora",
    "Dora",
    "Kasa",
    "Monteclora",
    "PlainLora",
    "QALora",
    "Variant",
    "Velora",
    "disk_leaf",
    "places_of_variants",
    "register",
    "variant_for",
]

_VARIANTS: list[tuple[Callable[[LoraConfig], bool], Variant]] = []
_PLAIN = PlainLora()


def register(means: Callable[[LoraConfig], bool], variant: Variant) -> None:
    """Use `variant` for every config for which `means(config)` is true."""
    _VARIANTS.append((means, variant))
    places_of_variants.cache_clear()


def variant_for(config: LoraConfig) -> Variant:
    """The variant that a config means."""
    return next((variant for means, variant in _VARIANTS if means(config)), _PLAIN)


@functools.cache
def places_of_variants() -> frozenset[str]:
    """The places where any variant keeps parameters of its own."""
    return frozenset(
        place for _, variant in _VARIANTS for place in (*variant.places, *variant.buffers)
    )


def disk_leaf(leaf: str) -> str:
    """A parameter's name on disk, from its name inside a layer without the adapter's."""
    return next(
        (variant.spelling[leaf] for _, variant in _VARIANTS if leaf in variant.spelling), leaf
    )


register(is_adalora, AdaLora())
register(lambda config: config.use_dora, Dora())
register(lambda config: config.alora_invocation_tokens is not None, ALora())
register(lambda config: config.arrow_config is not None, Arrow())
register(is_mica, MicaLora())
register(lambda config: config.use_qalora, QALora())
register(lambda config: config.velora_config is not None, Velora())
register(lambda config: config.monteclora_config is not None, Monteclora())
register(lambda config: config.use_bdlora is not None, BdLora())
register(lambda config: config.kasa_config is not None, Kasa())
