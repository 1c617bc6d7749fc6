"""The numbers of a config, from what an adapter's layers hold now."""

from __future__ import annotations

from collections.abc import Mapping

from lamina.checkpoint.origin import PREFIX
from lamina.config import LoraConfig, numbers
from lamina.engine.layers import LayerAdapter, LoraLayer


def describe_numbers(layers: Mapping[str, LoraLayer], config: LoraConfig, adapter: str) -> None:
    """Make `config` say the ranks and scalings of an adapter; as it is where it does already.

    Args:
        layers: name in the model -> layer.
        config: the adapter's, changed in place: `r`, `lora_alpha` and their patterns.
        adapter: its name.
    """
    facts = {
        path.removeprefix(PREFIX): (
            layer.factors(adapter)[0].shape[0],
            float(layer.records[adapter].scaling),
        )
        for path, layer in layers.items()
        if adapter in layer.records
    }
    if not facts or all(_says(config, path, *fact) for path, fact in facts.items()):
        return
    ranks = {path: rank for path, (rank, _) in facts.items()}
    if any(numbers(config, path)[0] != rank for path, rank in ranks.items()):
        config.r = max(ranks.values())
        config.rank_pattern = {p: rank for p, rank in ranks.items() if rank != config.r}
    alphas = {path: _alpha(config, rank, scaling) for path, (rank, scaling) in facts.items()}
    config.lora_alpha = max(alphas.values())
    config.alpha_pattern = {p: alpha for p, alpha in alphas.items() if alpha != config.lora_alpha}


def _says(config: LoraConfig, path: str, rank: int, scaling: float) -> bool:
    r, alpha = numbers(config, path)
    told = LayerAdapter.of(config, r, alpha).scaling
    return r == rank and abs(told - scaling) <= 1e-6 * abs(scaling)


def _alpha(config: LoraConfig, rank: int, scaling: float) -> float:
    alpha = scaling * (rank**0.5 if config.use_rslora else rank)
    # Scalings that are tensors are in fp32.
    return round(alpha) if abs(alpha - round(alpha)) <= 1e-6 * abs(alpha) else alpha
