"""Adapters whose weights are not zero, and snapshots of models to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamina.config import LoraConfig
from lamina.model import PeftModel, get_peft_model, get_peft_model_state_dict
from tests import models

WEIGHTS = "adapter_model.safetensors"


def fill(model: nn.Module, adapter: str = "default", seed: int = 0, size: float = 0.1) -> None:
    """Give every tensor of an adapter seeded random values, so that it changes the outputs."""
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in sorted(get_peft_model_state_dict(model, adapter_name=adapter).items()):
        noise = torch.randn(tensor.shape, generator=generator) * size
        tensor.data.copy_(noise)


def llama_adapter(seed: int = 1, **config: Any) -> PeftModel:
    """A tiny Llama under a filled adapter."""
    model = get_peft_model(models.tiny_llama(), llama_config(**config))
    fill(model, seed=seed)
    return model.eval()


def llama_config(**changes: Any) -> LoraConfig:
    """A config for the query and value projections of a Llama."""
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


@torch.no_grad()
def logits(model: nn.Module, seed: int = 0) -> Tensor:
    """What a language model or classifier answers to fixed ids."""
    return model(input_ids=models.token_ids(seed=seed)).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two dicts of tensors have the same names in order, dtypes and bits."""
    return list(first) == list(second) and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(first.values(), second.values(), strict=True)
    )


def flags(model: nn.Module) -> dict[str, bool]:
    """Which parameters ask for gradients."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def trained(model: nn.Module) -> set[str]:
    """The names of the parameters that ask for gradients."""
    return {name for name, wanted in flags(model).items() if wanted}


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a saved adapter by what `change` makes of them."""
    path = directory / WEIGHTS
    changed = change(load_file(path))
    save_file({key: value.contiguous() for key, value in changed.items()}, path)


def renamed(directory: Path, old: str, new: str) -> None:
    """Replace the beginning of all names in a saved adapter."""
    rewrite(
        directory, lambda file: {new + key.removeprefix(old): value for key, value in file.items()}
    )
