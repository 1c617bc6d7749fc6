"""Which of a layer's inputs count, and where batches go."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

PrepareLayer = Callable[[Any, Any, str], torch.Tensor]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on a batch of keyword arguments."""
    return model(**inputs)


def language_modeling_mask(model_input: Any, peft_config: Any) -> torch.Tensor:
    """Indices (n x dimensions) of the tokens that count: not padded, and with a label if asked.

    Raises:
        TypeError: the batch is no dict.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(
            "When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary"
        )
    if "attention_mask" in model_input:
        counts: torch.Tensor = model_input["attention_mask"].bool()
    else:
        counts = torch.ones_like(model_input["input_ids"]).bool()
    settings = peft_config.eva_config
    if settings.use_label_mask and "labels" in model_input:
        counts = counts & (model_input["labels"] != settings.label_mask_value)
    return counts.nonzero()


def language_modeling_rows(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    """The layer's inputs at the tokens that count: n x features."""
    rows: torch.Tensor = first_tensor(layer_input, layer_name)[model_input.T.unbind()]
    return rows


def all_rows(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    """All of the layer's inputs: n x features."""
    tensor = first_tensor(layer_input, layer_name)
    return tensor.flatten(0, -2) if tensor.ndim > 2 else tensor


def first_tensor(layer_input: Any, layer_name: str) -> torch.Tensor:
    """The input itself, of what a hook is given.

    Raises:
        TypeError: there is none.
    """
    first = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(first, torch.Tensor):
        raise TypeError(
            f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer "
            f"{layer_name}, please provide a custom prepare_layer_inputs_fn"
        )
    return first


def to_device(inputs: Any, device: torch.device) -> Any:
    """A batch with all that can be moved on a device."""
    if hasattr(inputs, "to"):
        return inputs.to(device)
    kind: Any = type(inputs)
    if isinstance(inputs, Mapping):
        return kind({key: to_device(value, device) for key, value in inputs.items()})
    if isinstance(inputs, (tuple, list)):
        return kind(to_device(value, device) for value in inputs)
    warnings.warn(
        f"input of type {type(inputs)} could not be moved to the correct device", stacklevel=2
    )
    return inputs


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return rows
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(each) for each in counts]
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded)
    return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])


def fingerprint(rows: torch.Tensor) -> bytes:
    """The same for the same numbers, and for no others."""
    plain = rows.detach().cpu().contiguous()
    digest = hashlib.blake2b(repr((plain.shape, plain.dtype)).encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
