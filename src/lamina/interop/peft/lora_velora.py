"""VeLoRA's arithmetic under peft's names."""

from __future__ import annotations

import torch

from lamina.engine.ops import velora
from lamina.engine.ops.velora import VeloraFunction

__all__ = ["VeloraFunction"]

get_group_dim = velora.group_size
reshape_to_grouped_subtokens = velora.grouped
compress_activations = velora.compress
normalize_projection = velora.normalised


def reconstruct_activations(
    compressed: torch.Tensor, embed: torch.Tensor, in_features: int, velora_scale: float
) -> torch.Tensor:
    """What is known of the input again; see `lamina.engine.ops.velora.reconstruct`."""
    return velora.reconstruct(compressed, embed, in_features, velora_scale)
