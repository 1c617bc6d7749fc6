"""Biases of the base that an adapter trains along (`bias="all"` or `"lora_only"`).

PEFT's format stores them under the base's own names, and optimizers hold the base's own
parameters. So the values are swapped in and out of those parameters, by reference: the parameter
object stays, its data changes. The base's values come back whenever no adapter owns the biases.
Others may put new parameters into the modules (`load_state_dict(assign=True)`), so that they are
looked up each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Values = dict[str, torch.Tensor]


@dataclass(eq=False)
class TrainedBiases:
    """The biases that adapters own, by their names in the model (without `base_layer`).

    Each name has an owner of its own: an adapter that trains a few leaves the others to whoever
    trains those.

    Attributes:
        modules: those whose `bias` any adapter trains.
        values: adapter -> name -> values, for the names that it trains. Out of date where the
            adapter is shown: there the parameter holds the current values.
        original: the base's own values, likewise out of date where nobody is shown.
        shown: name -> the adapter whose values are in the parameter now, or None.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)
    original: Values = field(default_factory=dict)
    shown: dict[str, str | None] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The base's bias parameters that any adapter trains."""
        return {name: _bias(module) for name, module in self.modules.items()}

    def adopt(self, adapter: str, modules: Mapping[str, nn.Module]) -> None:
        """Give `adapter` its own copies of these modules' biases, as they are now."""
        for name, module in modules.items():
            if name not in self.modules:
                self.modules[name] = module
                self.original[name] = _bias(module).data.clone()
                self.shown[name] = None
        owned = self.values.setdefault(adapter, {})
        owned.update({name: _bias(module).data.clone() for name, module in modules.items()})

    def owner(self, name: str, contributing: Sequence[str]) -> str | None:
        """The adapter whose values count: the last contributing one that trains this bias."""
        for adapter in reversed(contributing):
            if name in self.values.get(adapter, {}):
                return adapter
        return None

    def show(self, contributing: Sequence[str]) -> None:
        """Put the values that go with these adapters (none: the base's) into the parameters."""
        for name, parameter in self.parameters.items():
            before, now = self.shown[name], self.owner(name, contributing)
            if before == now:
                continue
            self._slot(before)[name] = parameter.data
            incoming = self._slot(now)[name]
            parameter.data = incoming.to(device=parameter.device, dtype=parameter.dtype)
            self.shown[name] = now

    def of(self, adapter: str) -> Values:
        """The current values of the biases that `adapter` trains."""
        return {
            name: _bias(self.modules[name]).data if self.shown[name] == adapter else value
            for name, value in self.values.get(adapter, {}).items()
        }

    def drop(self, adapter: str) -> None:
        """Forget the values of `adapter`; the caller then shows what is left."""
        for name in self.values.pop(adapter, {}):
            if self.shown[name] == adapter:
                parameter = _bias(self.modules[name])
                parameter.data = self.original[name].to(parameter)
                self.shown[name] = None

    def _slot(self, adapter: str | None) -> Values:
        return self.original if adapter is None else self.values[adapter]


def _bias(module: nn.Module) -> nn.Parameter:
    # FSDP has a view of its own parameter there.
    bias: Any = module.bias
    held: nn.Parameter = bias
    return held
