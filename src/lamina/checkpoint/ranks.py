"""Adapters whose ranks are shared out among layers (AdaLoRA): only those left are on disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lamina.checkpoint.keys import Slot
from lamina.checkpoint.origin import PREFIX
from lamina.config import AdaLoraConfig, LoraConfig
from lamina.engine.allocation import left_of


def without_lost_ranks(
    tensors: Mapping[str, torch.Tensor], found: Mapping[str, Slot], config: LoraConfig
) -> dict[str, torch.Tensor]:
    """An adapter's tensors without the ranks that its training has taken away.

    Args:
        tensors: name on disk -> tensor.
        found: the slots of the same names.
        config: the adapter's.
    """
    if not isinstance(config, AdaLoraConfig) or not config.rank_pattern:
        return dict(tensors)
    left = {}
    for key, tensor in tensors.items():
        slot = found[key]
        mask = config.ranks_left(slot.module.removeprefix(PREFIX))
        along = slot.ranks_along
        whole = mask is not None and along is not None and tensor.shape[along] == len(mask)
        left[key] = left_of(slot.leaf, tensor, mask) if whole and mask is not None else tensor
    return left


def misfits(
    matched: Mapping[str, Slot], given: Mapping[str, torch.Tensor]
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(name, shape in the file, shape in the model) of tensors that can't be put in their slots."""
    ranks: dict[str, set[int]] = {}
    for key, slot in matched.items():
        if slot.ranks_along is not None and slot.fits(given[key].shape):
            ranks.setdefault(slot.module, set()).add(given[key].shape[slot.ranks_along])
    return [
        (key, tuple(given[key].shape), tuple(slot.tensor.shape))
        for key, slot in matched.items()
        if not slot.fits(given[key].shape)
        # Ranks may be fewer, but in one layer as many everywhere.
        or (len(ranks.get(slot.module, ())) > 1 and given[key].shape != slot.tensor.shape)
    ]
