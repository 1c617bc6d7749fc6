"""The kinds of layers that can be adapted: a table from a module to the class that adapts it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lamina.config import AdaLoraConfig, LoraConfig
from lamina.engine.layers.attention import MultiheadAttention
from lamina.engine.layers.base import LayerAdapter, LoraLayer
from lamina.engine.layers.conv import Conv1d, Conv2d, Conv3d
from lamina.engine.layers.embedding import Embedding
from lamina.engine.layers.linear import Linear, is_conv1d
from lamina.engine.layers.parameter import ParamWrapper
from lamina.engine.layers.saved import ModulesToSaveWrapper
from lamina.engine.layers.svd import SvdConv2d, SvdLayer, SvdLinear
from lamina.engine.layers.tokens import TrainableTokensLayer, TrainableTokensWrapper
from lamina.engine.layers.walk import lora_layers, saved_modules

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "LayerAdapter",
    "Linear",
    "LoraLayer",
    "ModulesToSaveWrapper",
    "MultiheadAttention",
    "ParamWrapper",
    "SvdConv2d",
    "SvdLayer",
    "SvdLinear",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
    "is_linear",
    "layer_class",
    "lora_layers",
    "register",
    "saved_modules",
]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map: `nn.Linear`, `Conv1D`, or a quantiser's stand-in."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    if isinstance(module, (LoraLayer, nn.Bilinear)) or next(module.children(), None) is not None:
        return False
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return bool(tensors) and all(isinstance(size, int) for size in sizes)


_KINDS: list[tuple[Callable[[nn.Module], bool], type[LoraLayer]]] = [
    (is_linear, Linear),
    (lambda module: isinstance(module, nn.MultiheadAttention), MultiheadAttention),
    (lambda module: isinstance(module, nn.Embedding), Embedding),
    (lambda module: isinstance(module, nn.Conv1d), Conv1d),
    (lambda module: isinstance(module, nn.Conv2d), Conv2d),
    (lambda module: isinstance(module, nn.Conv3d), Conv3d),
]


# AdaLoRA keeps its factors otherwise, so it has layers of its own.
_SVD_KINDS: list[tuple[Callable[[nn.Module], bool], type[LoraLayer]]] = [
    (is_linear, SvdLinear),
    (lambda module: isinstance(module, nn.Conv2d), SvdConv2d),
]


def register(adapts: Callable[[nn.Module], bool], kind: type[LoraLayer]) -> None:
    """Adapt modules for which `adapts(module)` is true by `kind`, before earlier entries."""
    _KINDS.insert(0, (adapts, kind))


def layer_class(module: nn.Module, config: LoraConfig | None = None) -> type[LoraLayer] | None:
    """The class that adapts a module, by the method of `config`; None if there is none."""
    own = config.layer_kinds if config is not None else {}
    for base, own_kind in own.items():
        if isinstance(module, base):
            return own_kind
    kinds = [*_SVD_KINDS, *_KINDS] if isinstance(config, AdaLoraConfig) else _KINDS
    usual = next((kind for adapts, kind in kinds if adapts(module)), None)
    return usual if usual is None or config is None else config.instead.get(usual, usual)
