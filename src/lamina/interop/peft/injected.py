"""The configs of a model that adapters were injected into, without a facade around it."""

from __future__ import annotations

import warnings
from typing import Any

from lamina.engine.state import AdapterState


class InjectedConfigs(dict[str, Any]):
    """Name -> config; what is popped is gone for good.

    Libraries delete an adapter by `delete_adapter` on each layer and then pop its config. If it
    was the last active one, the first that is left takes over, as in peft.
    """

    def __init__(self, state: AdapterState) -> None:
        super().__init__(state.configs)
        self.state = state

    def pop(self, name: str, *default: Any) -> Any:
        """Remove a config, and its name from what is active."""
        config = super().pop(name, *default)
        state = self.state
        state.trainable -= {name}
        if state.active == (name,) and self:
            warnings.warn(
                f"Adapter {name} was active which is now deleted. Setting active adapter to "
                f"{next(iter(self))}.",
                stacklevel=2,
            )
        for member in list(state.members):
            if name in member.active_names:
                rest = tuple(other for other in member.active_names if other != name)
                member.set_adapter(rest or tuple(self)[:1])
        return config


def hand_out(model: Any, state: AdapterState) -> None:
    """Let a model show the configs of its adapters, as transformers and diffusers expect it."""
    if not isinstance(state.configs, InjectedConfigs):
        state.configs = InjectedConfigs(state)
    model.peft_config = state.configs
