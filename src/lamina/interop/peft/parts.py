"""Parts of models by peft's functions: submodules, devices, dtypes, wrappers of saved modules."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lamina.engine.layers import ModulesToSaveWrapper, TrainableTokensWrapper
from lamina.interop.peft.kbit import prepare_model_for_kbit_training
from lamina.interop.peft.matching import get_pattern_key, match_target_against_key
from lamina.interop.peft.standing import StandsFor

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "get_pattern_key",
    "match_target_against_key",
    "prepare_model_for_kbit_training",
]


class AuxiliaryTrainingWrapper(nn.Module, metaclass=StandsFor):
    """The base of what is trained beside the adapted layers."""

    stands_for: Any = (ModulesToSaveWrapper, TrainableTokensWrapper)


def infer_device() -> str:
    """The kind of accelerator that is there, or "cpu"."""
    for name in ("cuda", "mps", "xpu", "npu", "mlu"):
        backend = getattr(torch, name, None)
        if name == "mps":
            backend = torch.backends.mps
        if backend is not None and backend.is_available():
            return name
    return "cpu"


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, its name in the parent) of a module's whole name."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def get_submodules_with_grandparent(
    model: nn.Module, key: str
) -> tuple[nn.Module, nn.Module | None, nn.Module, str]:
    """(parent, grandparent, module, its name in the parent)."""
    parent, module, name = get_submodules(model, key)
    above = key.rpartition(".")[0].rpartition(".")[0]
    return parent, model.get_submodule(above), module, name


def get_input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """The name of a model's input embedding."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    wanted = model.get_input_embeddings()
    return next((name for name, module in model.named_modules() if module is wanted), default)


def freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze every parameter whose name has the adapter's in it."""
    for name, parameter in model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad = False


def set_layer_requires_grad(layer: Any, requires_grad: bool) -> None:
    """Let a tensor, or all of a layer's, ask for gradients or not."""
    tensors = [layer] if isinstance(layer, torch.Tensor) else layer.parameters()
    for tensor in tensors:
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False
) -> None:
    """Make adapters active in the modules that are trained whole."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.set_adapter(adapter_name, inference_mode=inference_mode)  # type: ignore[operator]


def get_no_split_modules(model: Any) -> set[str]:
    """The classes of modules that must stay on one device."""
    found: set[str] = set()
    for module in model.modules():
        found |= set(getattr(module, "_no_split_modules", None) or ())
    return found


def fsdp_auto_wrap_policy(model: Any) -> Any:
    """The policy by which FSDP shards a model: transformer blocks, and what trains by itself."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import (
        _or_policy,
        lambda_auto_wrap_policy,
        transformer_auto_wrap_policy,
    )

    names = FullyShardedDataParallelPlugin.get_module_class_from_name
    classes = set()
    for name in get_no_split_modules(model):
        found = names(model, name)
        if found is None:
            raise Exception(f"Could not find the transformer layer class {name} in the model.")
        classes.add(found)

    def trained_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.named_children()) and weight is not None and weight.requires_grad

    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=trained_leaf),
        functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes),
    ]
    return functools.partial(_or_policy, policies=policies)


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """The weight as (out x in), if it is stored the other way."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def is_valid_match(key: str, target_key: str) -> bool:
    """Whether a name ends on another, at a dot."""
    return key == target_key or key.endswith(f".{target_key}")


def get_batch_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int:
    """The batch size of a model's inputs.

    Raises:
        ValueError: neither is given.
    """
    for tensor in (input_ids, inputs_embeds):
        if tensor is not None:
            return int(tensor.shape[0])
    raise ValueError("You have to provide either input_ids or inputs_embeds")


def get_quantization_config(model: Any, method: str) -> Any:
    """A model's quantisation config, if it is of this method."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if getattr(model, "quantization_method", None) == method else None


def is_gptqmodel_quant_linear(layer: nn.Module) -> bool:
    """Whether a layer is GPTQModel's."""
    return any(kind.__name__ == "BaseQuantLinear" for kind in type(layer).__mro__)


def is_gptqmodel_awq_layer(layer: nn.Module) -> bool:
    """Whether a layer is GPTQModel's for AWQ."""
    return is_gptqmodel_quant_linear(layer) and "Awq" in type(layer).__name__


def get_gptqmodel_quant_linear(*args: Any, **kwargs: Any) -> Any:
    """The class of GPTQModel's layers, where it is installed."""
    try:
        from gptqmodel.nn_modules.qlinear import BaseQuantLinear  # type: ignore[import-not-found]
    except ImportError:
        return None
    return BaseQuantLinear


get_auto_gptq_quant_linear = get_gptqmodel_quant_linear


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """What tells whether two tensors share memory: the device, the storage, its size."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters to `dtype`, trained ones to fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def str_to_bool(value: str) -> int:
    """1 for a yes, 0 for a no.

    Raises:
        ValueError: it is neither.
    """
    lower = value.lower()
    if lower in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if lower in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {value}")


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **options: Any) -> bool | None:
    """Whether a repository has a file; None if that can't be told."""
    from huggingface_hub import file_exists

    try:
        return file_exists(repo_id, filename, **options)
    except Exception:
        return None


def shift_tokens_right(
    input_ids: torch.Tensor, pad_token_id: int | None, decoder_start_token_id: int
) -> torch.Tensor:
    """The decoder's inputs for its labels: one to the right, -100 as padding.

    Raises:
        ValueError: there is no padding token.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def names_tied_with_embedding(model: Any) -> list[str]:
    """The modules whose weight is the input embedding's, by the model's own account."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return []
    tied = getattr(model, "_tied_weights_keys", None)
    if not isinstance(tied, dict):
        return sorted({name.rpartition(".")[0] for name in tied or ()})
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            "The supplied model implements `_tied_weights_keys` as a dict but doesn't implement "
            "'get_input_embeddings' so we can't determine which weights are tied to embeddings."
        )
    return sorted({_place(model, name) for name in _tied_to_input(model)})


def _tied_to_input(model: Any) -> Iterable[str]:
    embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    sources = {
        name.replace("base_layer.", "").replace("original_module.", "")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in embedding
    }
    for path, module in model.named_modules():
        tied = getattr(module, "_tied_weights_keys", None)
        prefix = f"{path}." if path else ""
        for target, source in tied.items() if isinstance(tied, dict) else ():
            if f"{prefix}{source}" in sources:
                yield f"{prefix}{target}"


def _place(model: Any, parameter: str) -> str:
    module = parameter.rpartition(".")[0]
    try:
        inner = model.get_submodule(module)
    except AttributeError:
        return module
    return f"{module}.base_layer" if hasattr(inner, "base_layer") else module
