"""The names that a model's modules have when nothing is adapted, compiled or sharded.

Every other part speaks of modules by these plain names, so that an adapted model and a plain one
are targeted, saved and compared alike. That goes for models adapted by other libraries too, as
far as they name the parts of an adapted layer as PEFT does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lamina.config import LoraConfig
from lamina.engine.layers import (
    LoraLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    layer_class,
)

# Children under which torch's wrappers keep the module that they wrap.
_WRAPPER_CHILDREN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class Place:
    """A module and where it is.

    Attributes:
        name: its plain name.
        module: what is there now: the module itself, or the layer that adapts it.
        parent: the module that holds it; None at the root.
        child: its name in the parent.
    """

    name: str
    module: nn.Module
    parent: nn.Module | None
    child: str

    @property
    def original(self) -> nn.Module:
        """The module as it is without adapters."""
        return _foreign_base(self.module) or unadapted(self.module)


def _foreign_base(module: nn.Module) -> nn.Module | None:
    """What another library's LoRA layer, or saved module, was before; None for all else."""
    if isinstance(module, (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper)):
        return None
    parts = module._modules
    if "lora_A" in parts or "lora_embedding_A" in parts:
        return parts.get("base_layer")
    return parts.get("original_module") if "modules_to_save" in parts else None


def unadapted(module: nn.Module) -> nn.Module:
    """What an adapted layer or a saved module was before; other modules as they are."""
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_base_layer()
    if isinstance(module, LoraLayer):
        return module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper):
        return module.original_module
    return module


def way_in(module: nn.Module) -> str:
    """The dotted way from an adapted layer, or a saved module, to what was there before."""
    if isinstance(module, ModulesToSaveWrapper):
        return "original_module."
    if isinstance(module, TrainableTokensWrapper):
        return f"token_adapter.{way_in(module.token_adapter)}"
    return f"base_layer.{way_in(module.base_layer)}" if isinstance(module, LoraLayer) else ""


def places(model: nn.Module) -> Iterator[Place]:
    """All places of a model in the order of `named_modules`, never inside an adapter.

    A module that is held in several places comes at each of them.
    """
    yield from _walk(Place("", model, None, ""), frozenset())


def _walk(place: Place, above: frozenset[int]) -> Iterator[Place]:
    yield place
    inner = place.original
    above |= {id(inner)}
    # named_children would leave out the second place of a module.
    for key, child in inner._modules.items():
        # A module may hold one that it lies in.
        if child is not None and id(child) not in above:
            yield from _walk(Place(_join(place.name, key, inner), child, inner, key), above)


def _join(name: str, child: str, parent: nn.Module) -> str:
    if child in _WRAPPER_CHILDREN or (child == "module" and isinstance(parent, _PARALLEL)):
        return name
    return f"{name}.{child}" if name else child


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """All adapted layers with their plain names; a layer used twice comes once."""
    seen: set[int] = set()
    for place in places(model):
        if isinstance(place.module, LoraLayer) and id(place.module) not in seen:
            seen.add(id(place.module))
            yield place.name, place.module


def suffixes(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`: what may be written to mean a module."""
    while name:
        yield name
        _, _, name = name.partition(".")


def within(name: str, outer: str) -> bool:
    """Whether a module is `outer` or lies in it."""
    return name == outer or name.startswith(f"{outer}.")


def kind_at(place: Place, config: LoraConfig) -> type[LoraLayer] | None:
    """What adapts a place: what can by the config, or what has adapted it already."""
    now = place.module
    adapted = type(now) if isinstance(now, LoraLayer) and now.records else None
    return layer_class(place.original, config) or adapted
