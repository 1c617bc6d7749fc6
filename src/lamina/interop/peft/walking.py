"""Walk, copy and place modules, by peft's functions for tuners."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from lamina.engine.layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper

Value = TypeVar("Value")


def get_tuner_state_dict_key_prefixes(
    model: nn.Module, adapter_name: str | None = None
) -> set[str]:
    """Where the tensors of adapters (None: of all) lie, by the beginnings of their names."""
    found: set[str] = set()
    apart: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            # These tell their tensors by themselves.
            apart.append(f"{path}.")
        if not isinstance(module, LoraLayer) or path.startswith(tuple(apart)):
            continue
        for name, child in module.named_children():
            whole = f"{path}.{name}" if path else name
            by_adapter = isinstance(child, (nn.ModuleDict, nn.ParameterDict))
            if name == "base_layer":
                continue
            if adapter_name is None or not by_adapter:
                found.add(whole)
            elif adapter_name in child:  # type: ignore[operator]
                found.add(f"{whole}.{adapter_name}")
    return found


def filter_state_dict_by_key_prefixes(
    state_dict: Mapping[str, Value], prefixes: Collection[str]
) -> dict[str, Value]:
    """The entries whose names begin with one of these, up to a dot."""
    return {key: value for key, value in state_dict.items() if _under(key, prefixes)}


def _under(key: str, prefixes: Collection[str]) -> bool:
    while key:
        if key in prefixes:
            return True
        key = key.rpartition(".")[0]
    return False


def check_adapters_to_merge(module: Any, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters (None: the active ones) that are not folded into a layer yet.

    Raises:
        TypeError: the names are no list.
    """
    names = list(module.active_adapters) if adapter_names is None else adapter_names
    if isinstance(names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
    if not module.merged:
        return names
    left = [name for name in names if name not in module.merged_adapters]
    if left:
        warnings.warn(
            f"Already following adapters were merged {','.join(module.merged_adapters)}. "
            f"You are now additionally merging {','.join(left)}.",
            stacklevel=2,
        )
    else:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
    return left


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module; with `share_weights`, of everything but its parameters."""
    shared = {id(p): p for p in module.parameters()} if share_weights else {}
    return copy.deepcopy(module, dict(shared))


def replicate_layers(model: nn.Module, layer_map: list[tuple[int, int]]) -> None:
    """Make a transformer of ranges of its layers, which share their weights.

    Raises:
        ValueError: its layers can't be found.
    """
    holder: Any = model
    while hasattr(holder, "model"):
        holder = holder.model
    holder = getattr(holder, "bert", holder)
    places = ((holder, "layers"), (getattr(holder, "encoder", None), "layer"), (holder, "h"))
    found = [(o, n) for o, n in places if isinstance(getattr(o, n, None), nn.ModuleList)]
    if not found:
        raise ValueError(
            "Could not locate the layers attribute in the model. "
            "Expected Llama, Bert or Falcon compatible architectures."
        )
    owner, name = found[0]
    old = getattr(owner, name)
    new = [clone_module(old[i], True) for start, end in layer_map for i in range(start, end)]
    for index, layer in enumerate(new):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
    setattr(owner, name, nn.ModuleList(new))
    if hasattr(holder.config, "num_hidden_layers"):
        holder.config.num_hidden_layers = len(new)


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """A module's name in a model; empty if it isn't in it."""
    return next((n for n, m in model.named_modules() if m is reference_module), "")


def get_device_map(model: Any) -> dict[str, Any]:
    """Which part of a model is where."""
    spread = getattr(model, "hf_device_map", None)
    return spread if spread is not None else {"": next(model.parameters()).device}


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Have an offloaded layer's weights where they are computed with."""
    hooks: list[tuple[nn.Module, Any]] = [
        (module, module._hf_hook)
        for module in layer.modules()
        if getattr(getattr(module, "_hf_hook", None), "offload", False)
    ]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)
