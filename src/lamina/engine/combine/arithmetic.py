"""Task arithmetic: how tensors of the same shape, one per adapter, become one.

Sources: TIES-Merging, arXiv:2306.01708; DARE, arXiv:2311.03099.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensors = Sequence[torch.Tensor]


def keep_largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The `int(density * numel)` entries that are largest by magnitude; the others become 0."""
    if density >= 1:
        return tensor
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).reshape(tensor.shape)


def keep_random(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Each entry with probability `density`, divided by it, so that its expectation stays."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def weighted_sum(tensors: Tensors, weights: Sequence[float]) -> torch.Tensor:
    """`sum_i w_i * t_i`."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + weight * tensor
    return total


def agreed_sum(tensors: Tensors, weights: Sequence[float], majority: str) -> torch.Tensor:
    """For each entry the mean of `w_i * t_i` over the tensors that have the elected sign there.

    Args:
        tensors: of one shape; an entry that is 0 takes no part.
        weights: as many.
        majority: "total" elects the sign of the sum of the entries, "frequency" that which most
            of them have; a draw is positive.
    """
    stacked = torch.stack(list(tensors))
    weighted = torch.stack([w * tensor for tensor, w in zip(tensors, weights, strict=True)])
    return disjoint_mean(weighted, agreement(stacked, majority)).to(tensors[0].dtype)


def agreement(stacked: torch.Tensor, majority: str) -> torch.Tensor:
    """Where tensors, stacked along the first dimension, have the sign that is elected there."""
    votes = stacked if majority == "total" else stacked.sign()
    return stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)


def disjoint_mean(stacked: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean along the first dimension over what is in the mask; 0 where nothing is."""
    return (stacked * mask).sum(0) / mask.sum(0).clamp(min=1)
