"""Find the adapted layers of a model without walking through their adapters.

So the search costs the same however many adapters the layers have.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lamina.engine.layers.base import LoraLayer
from lamina.engine.layers.saved import ModulesToSaveWrapper


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """All adapted layers with their names in the model; a layer used twice comes once."""
    for path, module in _walk(model, "", set()):
        if isinstance(module, LoraLayer):
            yield path, module


def saved_modules(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """All modules that adapters train whole, with their names in the model."""
    for path, module in _walk(model, "", set()):
        if isinstance(module, ModulesToSaveWrapper):
            yield path, module


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for key, child in module._modules.items():
        inside_adapter = isinstance(module, LoraLayer) and key != "base_layer"
        if child is not None and not inside_adapter:
            yield from _walk(child, f"{path}.{key}" if path else key, seen)
