"""Turn adapters whose update is a change of the weight into plain LoRA adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.checkpoint.adapter import write_adapter
from lamina.checkpoint.keys import slots
from lamina.checkpoint.origin import PREFIX
from lamina.config import LoraConfig
from lamina.engine.combine import truncate_dense, truncate_product
from lamina.engine.inject import find_state
from lamina.engine.layers import LoraLayer, ModulesToSaveWrapper
from lamina.engine.layers.linear import is_conv1d
from lamina.errors import ConversionError
from lamina.model.combining import dense_update, is_sum
from lamina.model.original import factors_on_original
from lamina.storage.atomic import atomic_directory

Tensors = dict[str, torch.Tensor]


def supports_lora_conversion(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether `convert_to_lora` can take an adapter of this model: all its layers, and any."""
    layers = [layer for _, layer in _tuner_layers(model) if _has(layer, adapter_name)]
    return bool(layers) and all(_converts(layer, adapter_name) for layer in layers)


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, Tensors]:
    """The plain LoRA adapter that comes closest to an adapter, with the scaling 1.

    Layers of other libraries count too, if they have `get_delta_weight` and say that they
    `supports_lora_conversion`. In Lamina's own layers the update of any variant is taken as it
    acts: DoRA with its magnitudes. Linear layers are converted; modules trained whole come along.

    Args:
        model: the adapted model.
        rank: an int is the rank everywhere. A float in (0, 1] is the share of the update's squared
            singular values that each layer's smallest sufficient rank is to hold.
        adapter_name: the adapter that is converted.
        progressbar: show one.
        compile_kwargs: accepted; the work is in LAPACK, which compiling doesn't speed up.

    Returns:
        The config, and the tensors by their names on disk.

    Raises:
        ConversionError: a rank that is none or too large, or layers that can't be converted.
    """
    _check_rank(rank)
    layers = [(name, layer) for name, layer in _tuner_layers(model) if _has(layer, adapter_name)]
    _check_layers(layers, adapter_name)
    config = _begin(model, adapter_name, rank)
    tensors: Tensors = {}
    shown: Iterable[tuple[str, nn.Module]] = layers
    if progressbar:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        shown = tqdm(layers, desc="Converting to LoRA")
    for name, layer in shown:
        a, b = _factors(layer, adapter_name, rank)
        plain = name.removeprefix(PREFIX)
        found = a.shape[0]
        if found != config.r or not isinstance(rank, int):
            config.rank_pattern[plain] = config.alpha_pattern[plain] = found
        if isinstance(config.target_modules, set) and not _has_config(model, adapter_name):
            config.target_modules.add(plain)
        tensors[f"{name}.lora_A.weight"] = a
        tensors[f"{name}.lora_B.weight"] = b
    return config, {**tensors, **_saved_modules(model, adapter_name)}


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """`convert_to_lora`, written as an adapter directory, whole or not at all."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = True
    with atomic_directory(path) as staging:
        write_adapter(staging, config, tensors)


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConversionError(
            "If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but "
            f"got {rank}.",
            cure="pass an int for a rank",
        )
    if rank <= 0:
        raise ConversionError(
            f"Passing a rank of {rank} doesn't make sense: an adapter has at least one.",
            cure="pass a positive int, or a share up to 1.0",
        )


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Lamina's adapted layers, and those of other libraries, by duck typing."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) or (
            "base_layer" in module._modules and hasattr(module, "active_adapters")
        ):
            yield name, module


def _has(layer: nn.Module, adapter: str) -> bool:
    return not isinstance(layer, LoraLayer) or adapter in layer.records


def _converts(layer: nn.Module, adapter: str) -> bool:
    if isinstance(layer, LoraLayer):
        variant, config = layer.records[adapter].variant, layer.records[adapter].config
        can_fold = variant.why_not_foldable(layer, adapter) is None
        return layer.kind == "linear" and can_fold and not config.kasa_config
    says = getattr(layer, "supports_lora_conversion", None)
    return callable(says) and bool(says(adapter)) and hasattr(layer, "get_delta_weight")


def _check_layers(layers: list[tuple[str, nn.Module]], adapter: str) -> None:
    if not layers:
        raise ConversionError(
            "Could not detect any layer that supports LoRA conversion.",
            cure="pass the adapted model",
        )
    unable = [(name, layer) for name, layer in layers if not _converts(layer, adapter)]
    if unable:
        kinds = sorted({type(layer).__name__ for _, layer in unable})
        raise ConversionError(
            f"Some module types on this model do not support LoRA conversion: {', '.join(kinds)}.",
            faults=[name for name, _ in unable[:8]],
            cure="convert an adapter of linear layers whose update is a change of the weight",
        )


def _has_config(model: nn.Module, adapter: str) -> bool:
    return adapter in getattr(model, "peft_config", {})


def _begin(model: nn.Module, adapter: str, rank: int | float) -> LoraConfig:
    """The config without the ranks that differ from layer to layer."""
    base = rank if isinstance(rank, int) else 1
    theirs: Any = getattr(model, "peft_config", {}).get(adapter)
    if theirs is None:
        config = LoraConfig(r=base, lora_alpha=base, target_modules=["to be told"])
        config.target_modules = set()
        return config
    if getattr(theirs.peft_type, "value", theirs.peft_type) == "LORA":
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter changes its rank, "
            "and little else.",
            stacklevel=3,
        )
    for field in ("bias", "lora_bias"):
        if getattr(theirs, field, "none") not in ("none", False):
            raise ConversionError(
                f"The adapter's config sets {field}={getattr(theirs, field)}: what is trained "
                "beside the weights would be lost.",
            )
    taken = ("layers_pattern", "layers_to_transform", "modules_to_save", "exclude_modules")
    copied: dict[str, Any] = {name: copy.copy(getattr(theirs, name, None)) for name in taken}
    return LoraConfig(
        r=base,
        lora_alpha=base,
        target_modules=copy.copy(theirs.target_modules),
        base_model_name_or_path=theirs.base_model_name_or_path,
        task_type=getattr(theirs.task_type, "value", theirs.task_type),
        **copied,
    )


def _factors(
    layer: nn.Module, adapter: str, rank: int | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one layer, in the dtype of the update."""
    if isinstance(layer, LoraLayer) and is_sum(layer, adapter):
        whole = factors_on_original(layer, adapter)
        dtype, shape = whole.A.dtype, (whole.B.shape[0], whole.A.shape[1])
        _check_fits(rank, shape)
        found = truncate_product(whole.B.double() * whole.scaling, whole.A.double(), rank)
    else:
        update, dtype = _dense(layer, adapter)
        _check_fits(rank, tuple(update.shape))
        found = truncate_dense(update, rank)
    return found.A.to(dtype).contiguous(), found.B.to(dtype).contiguous()


def _dense(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.dtype]:
    if isinstance(layer, LoraLayer):
        return dense_update(layer, adapter), layer.factors(adapter)[0].dtype
    delta: torch.Tensor = layer.get_delta_weight(adapter)
    update = delta.T if is_conv1d(layer.get_base_layer()) else delta
    return update.float(), delta.dtype


def _check_fits(rank: int | float, shape: tuple[int, ...]) -> None:
    if isinstance(rank, int) and rank > min(shape):
        raise ConversionError(
            f"The chosen rank {rank} is larger than the weight shape ({min(shape)}), please choose "
            "a lower rank."
        )


def _saved_modules(model: nn.Module, adapter: str) -> Tensors:
    """The modules that the adapter has trained whole, by their names on disk."""
    state = find_state(model)
    if state is not None:
        found = slots(model, adapter, state, alone=True).items()
        return {key: slot.tensor.detach() for key, slot in found if slot.kind == "saved"}
    tensors = {}
    for name, module in model.named_modules():
        copies = module._modules.get("modules_to_save")
        if isinstance(module, ModulesToSaveWrapper) or not isinstance(copies, nn.ModuleDict):
            continue
        if adapter in copies and "original_module" in module._modules:
            for leaf, value in copies[adapter].state_dict().items():
                tensors[f"{name}.{leaf}"] = value.detach()
    return tensors
