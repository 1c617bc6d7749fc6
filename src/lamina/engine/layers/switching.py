"""Layers that obey the shared state, and may for a while be switched one by one.

Code written for other libraries walks a model and calls `set_adapter` or `enable_adapters` on each
layer. Such a call overrides the shared state for this layer; when all layers say the same, that
becomes the shared state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from lamina.engine.state import AdapterState, Override


class Switched(nn.Module):
    """The base of everything in a model whose forward depends on which adapters are active."""

    adapter_state: AdapterState
    # What this one layer was told; None means that the shared state counts.
    override: Override | None = None

    def __init__(self, state: AdapterState) -> None:
        super().__init__()
        self.adapter_state = state
        state.members.add(self)

    def own_adapters(self) -> Collection[str]:
        """The names of the adapters that have weights here."""
        raise NotImplementedError

    def trained_parameters(self, name: str) -> Iterable[nn.Parameter]:
        """The parameters of an adapter that may ask for gradients."""
        raise NotImplementedError

    def contributing_names(self) -> tuple[str, ...]:
        """The adapters that take part in this layer's forward, whether it has them or not."""
        state, override = self.adapter_state, self.override
        if override is None or state.disabled:
            return state.contributing
        return () if override.disabled else override.active

    @property
    def active_names(self) -> tuple[str, ...]:
        """The adapters that are active for this layer, whether it has them or not."""
        return self.override.active if self.override else self.adapter_state.active

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are active here."""
        return list(self.active_names)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapters: of a layer, unlike of a model, a list even if there is one."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off here for now."""
        override = self.override
        return self.adapter_state.disabled or (override is not None and override.disabled)

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Make adapters active in this layer, and trainable unless `inference_mode`.

        On a whole model, `PeftModel.set_adapter` is meant, which leaves trainability alone.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name in self.own_adapters():
            self._ask_gradients(name, name in names and not inference_mode)
        trainable = frozenset() if inference_mode else frozenset(names)
        self.adapter_state.override(self, Override(names, self.disable_adapters, trainable))

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters of this layer on, making the active ones trainable, or off."""
        active = self.active_names
        for name in self.own_adapters():
            self._ask_gradients(name, enabled and name in active)
        trainable = frozenset(active) if enabled else frozenset()
        self.adapter_state.override(self, Override(active, not enabled, trainable))

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Let this layer's weights of adapters ask for gradients, or not."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name in names & set(self.own_adapters()):
            self._ask_gradients(name, requires_grad)

    def _ask_gradients(self, name: str, wanted: bool) -> None:
        for parameter in self.trained_parameters(name):
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(wanted)

    @property
    def _disable_adapters(self) -> bool:
        return self.disable_adapters

    @property
    def _active_adapter(self) -> Any:
        return self.active_adapter

    @_active_adapter.setter
    def _active_adapter(self, names: str | Iterable[str]) -> None:
        # Unlike set_adapter, this leaves alone what trains.
        told = (names,) if isinstance(names, str) else tuple(names)
        trainable = self.override.trainable if self.override else self.adapter_state.trainable
        self.adapter_state.override(self, Override(told, self.disable_adapters, trainable))

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.own_adapters())
