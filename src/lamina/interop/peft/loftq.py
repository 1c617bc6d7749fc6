"""LoftQ by peft's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.engine.init.loftq import decompose
from lamina.errors import InitialisationError
from lamina.model import loftq as native

__all__ = ["loftq_init", "replace_lora_weights_loftq"]


@torch.no_grad()
def loftq_init(
    weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Q, A, B): what is left of a weight in so many bits, in its dtype, and the factors."""
    quantised, A, B = decompose(weight.detach().float(), num_bits, reduced_rank, num_iter)
    return quantised.to(weight.dtype), A, B


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Let an adapter make up for what 4 bits have lost; a local model has to be named.

    Raises:
        ValueError: there is no quantised layer, or no dense model.
    """
    if model_path is None:
        base: Any = getattr(peft_model, "get_base_model", lambda: peft_model)()
        name = getattr(base, "name_or_path", None)
        if not name or Path(name).exists():
            raise InitialisationError(
                "The provided model does not appear to be a transformers model or is a local "
                "model. In this case, you must pass the model_path argument that points to the "
                "safetensors file."
            )
    native.replace_lora_weights_loftq(peft_model, model_path, adapter_name, callback)
