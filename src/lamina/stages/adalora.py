"""AdaLoRA's file as plain LoRA: its singular values go into A."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import torch

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.origin import PREFIX, plain_key
from lamina.config import AdaLoraConfig, LoraConfig
from lamina.engine.flat_config import as_written, flat_config_of_names
from lamina.engine.layers.svd import TINY
from lamina.errors import CheckpointError


def as_plain_lora(file: AdapterFile) -> AdapterFile:
    """`lora_alpha / (init_r + 1e-5) * B @ (E * A)` as `scaling * B @ A'`; other files as they are.

    A' is rounded once, to at least fp32. A module that has lost all ranks gets one of zeros.

    Raises:
        CheckpointError: a module lacks one of its three tensors.
    """
    config = file.config
    if not isinstance(config, AdaLoraConfig):
        return file
    tensors = {plain_key(key): tensor for key, tensor in file.tensors.items()}
    modules = [key.removeprefix(PREFIX).removesuffix(".lora_A") for key in tensors if _is_a(key)]
    ranks = {}
    for module in modules:
        a, e, b = (_take(tensors, f"{PREFIX}{module}.lora_{leaf}", file.source) for leaf in "AEB")
        if len(a) == 0:
            a, e, b = a.new_zeros(1, a.shape[1]), e.new_zeros(1, 1), b.new_zeros(b.shape[0], 1)
        dtype = torch.promote_types(a.dtype, torch.float32)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = (a.double() * e.double()).to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.to(dtype)
        ranks[module] = len(a)
    plain = _plain(config)
    alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
    scaling = alpha / (config.init_r + TINY)
    flat = flat_config_of_names(plain, [plain], ranks, scaling)
    return replace(file, config=flat, tensors=tensors)


def _is_a(key: str) -> bool:
    return key.endswith(".lora_A")


def _take(tensors: dict[str, torch.Tensor], key: str, source: str) -> torch.Tensor:
    if key not in tensors:
        raise CheckpointError(
            f"{source} lacks {key}.",
            cure="save or download the adapter again; the file is incomplete",
        )
    return tensors.pop(key)


def _plain(config: AdaLoraConfig) -> LoraConfig:
    own = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "runtime_config"}
    fields = [field.name for field in dataclasses.fields(LoraConfig) if field.name not in own]
    return as_written(LoraConfig(**{name: getattr(config, name) for name in fields}))
