"""EVA before its data is seen: A random, B zero; the pass over the data then sets A."""

from __future__ import annotations

from lamina.engine.init.base import Begun
from lamina.engine.init.standard import kaiming


def eva(layer: Begun, adapter: str) -> None:
    """B zero; A as ever until `initialize_lora_eva_weights` gives it the inputs' directions.

    Source: arXiv:2410.07170.
    """
    if layer.is_embedding:
        kaiming(layer, adapter)
        return
    _, B = layer.factors(adapter)
    B.zero_()
