"""Modules that are trained whole and saved with the adapter (`modules_to_save`)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from lamina.engine.layers.mixing import by_rows
from lamina.engine.layers.switching import Switched
from lamina.engine.routing import Routing
from lamina.engine.state import AdapterState


class ModulesToSaveWrapper(Switched):
    """A module and a trained copy of it for each adapter that asked for one.

    The forward takes the copy of the last contributing adapter that has one, else the original.
    """

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, module_to_save: nn.Module, state: AdapterState) -> None:
        super().__init__(state)
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict()
        self.train(module_to_save.training)

    def add_adapter(self, name: str, tied_to: ModulesToSaveWrapper | None = None) -> None:
        """Give an adapter its copy; it begins as what the forward takes now, or as the original.

        Args:
            name: the adapter.
            tied_to: the wrapper of the embedding whose copy's weight this copy shares.
        """
        anew = self.adapter_state.copies_begin_as_base
        original: Any = self.original_module if anew else self.effective()
        if tied_to is None:
            self.modules_to_save[name] = copy.deepcopy(original)
            return
        shared = tied_to.modules_to_save[name].weight
        # What is in the memo already is not copied.
        self.modules_to_save[name] = copy.deepcopy(original, {id(original.weight): shared})
        # Not as children: the wrappers lie side by side in the model.
        self.__dict__.setdefault("_tied", {})[name] = tied_to

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter's copy."""
        del self.modules_to_save[name]

    def effective(self) -> nn.Module:
        """The module that the forward takes."""
        for name in reversed(self.contributing_names()):
            if name in self.modules_to_save:
                return self.modules_to_save[name]
        return self.original_module

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Parameters and buffers of an adapter's copy, by their names inside the module."""
        return dict(self.modules_to_save[name].state_dict(keep_vars=True))

    def assign(self, name: str, leaf: str, value: torch.Tensor) -> None:
        """Make `value` the parameter or buffer `leaf` of an adapter's copy; no copy is made."""
        path, _, attribute = leaf.rpartition(".")
        owner = self.modules_to_save[name].get_submodule(path)
        source = self.__dict__.get("_tied", {}).get(name)
        if source is not None and leaf == "weight":
            source.assign(name, leaf, value)
            owner._parameters[attribute] = source.modules_to_save[name].weight
            return
        before = owner._parameters.get(attribute)
        if before is None:
            owner._buffers[attribute] = value
        else:
            owner._parameters[attribute] = nn.Parameter(value, requires_grad=before.requires_grad)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The names of an adapter's tensors on disk -> in this module, for transformers."""
        if adapter_name not in self.modules_to_save:
            return {}
        return {
            leaf: f"modules_to_save.{adapter_name}.{leaf}" for leaf in self.tensors(adapter_name)
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the effective module gives, or in a mixed batch, the copy of each row's adapter."""
        names = kwargs.pop("adapter_names", None)
        routing = self.adapter_state.routing if names is None else Routing(tuple(names))
        if routing is not None and routing.names is not None and not self.disable_adapters:
            return by_rows(self.original_module, self.modules_to_save, routing, args, kwargs)
        return self.effective()(*args, **kwargs)

    def own_adapters(self) -> Collection[str]:
        return self.modules_to_save.keys()

    def trained_parameters(self, name: str) -> Iterator[nn.Parameter]:
        return self.modules_to_save[name].parameters()

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that have a copy."""
        return [name for name in self.active_names if name in self.modules_to_save]

    @property
    def _adapters(self) -> set[str]:
        return set(self.modules_to_save)

    def _get_available_adapters(self) -> set[str]:
        return self._adapters

    @property
    def weight(self) -> torch.Tensor:
        """The effective module's weight."""
        effective: Any = self.effective()
        weight: torch.Tensor = effective.weight
        return weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.effective(), name)
