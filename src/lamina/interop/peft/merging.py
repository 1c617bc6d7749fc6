"""peft's functions on task tensors (`peft.utils.merge_utils`), by those of the engine."""

from __future__ import annotations

import warnings

import torch

from lamina.engine.combine.arithmetic import (
    agreed_sum,
    agreement,
    disjoint_mean,
    keep_largest,
    keep_random,
    weighted_sum,
)
from lamina.errors import ConfigError

Tensors = list[torch.Tensor]


def prune(tensor: torch.Tensor, density: float, method: str, rescale: bool = False) -> torch.Tensor:
    """Keep a share of the entries: the largest ("magnitude") or any ("random")."""
    if density >= 1:
        warnings.warn(f"The density {density} is at least 1: no pruning is done.", stacklevel=2)
        return tensor
    if density < 0:
        raise ConfigError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale)
    raise ConfigError(f"Unknown method {method}", cure="'magnitude' or 'random'")


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The largest entries."""
    return keep_largest(tensor, density)


def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Random entries, divided by the density where `rescale` says so."""
    kept = keep_random(tensor, density)
    return kept if rescale or density >= 1 else kept * density


def calculate_majority_sign_mask(tensor: torch.Tensor, method: str = "total") -> torch.Tensor:
    """Where the tensors, stacked along the first dimension, have the elected sign."""
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    return agreement(tensor, method)


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """The mean over the tensors in the mask."""
    return disjoint_mean(task_tensors, majority_sign_mask)


def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weights with as many dimensions as the tensors."""
    return weights.reshape(*weights.shape, *[1] * (task_tensors.dim() - weights.dim()))


def task_arithmetic(task_tensors: Tensors, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum."""
    return weighted_sum(task_tensors, weights.tolist())


def magnitude_prune(task_tensors: Tensors, weights: torch.Tensor, density: float) -> torch.Tensor:
    """The weighted sum of the largest entries."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def ties(
    task_tensors: Tensors,
    weights: torch.Tensor,
    density: float,
    majority_sign_method: str = "total",
) -> torch.Tensor:
    """TIES: the largest entries, where they agree with the elected sign."""
    kept = [prune(tensor, density, "magnitude") for tensor in task_tensors]
    return agreed_sum(kept, weights.tolist(), majority_sign_method)


def dare_linear(task_tensors: Tensors, weights: torch.Tensor, density: float) -> torch.Tensor:
    """DARE: the weighted sum of random entries, scaled up."""
    return task_arithmetic([prune(t, density, "random", True) for t in task_tensors], weights)


def dare_ties(
    task_tensors: Tensors,
    weights: torch.Tensor,
    density: float,
    majority_sign_method: str = "total",
) -> torch.Tensor:
    """DARE, then TIES."""
    kept = [prune(tensor, density, "random", True) for tensor in task_tensors]
    return agreed_sum(kept, weights.tolist(), majority_sign_method)
