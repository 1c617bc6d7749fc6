"""Biases of the base that an adapter trains along (`bias="all"` or `"lora_only"`).

PEFT's format stores them under the base's own names, and optimizers hold the base's own
parameters. So the values are swapped in and out of those parameters, by reference: the parameter
object stays, its data changes. The base's values come back whenever no adapter owns the biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

Values = dict[str, torch.Tensor]


@dataclass(eq=False)
class TrainedBiases:
    """The biases that adapters own, by their names in the model (without `base_layer`).

    Each name has an owner of its own: an adapter that trains a few leaves the others to whoever
    trains those.

    Attributes:
        parameters: the base's bias parameters that any adapter trains.
        values: adapter -> name -> values, for the names that it trains. Out of date where the
            adapter is shown: there the parameter holds the current values.
        original: the base's own values, likewise out of date where nobody is shown.
        shown: name -> the adapter whose values are in the parameter now, or None.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)
    original: Values = field(default_factory=dict)
    shown: dict[str, str | None] = field(default_factory=dict)

    def adopt(self, adapter: str, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give `adapter` its own copies of these biases, starting from what they are now."""
        for name, parameter in parameters.items():
            if name not in self.parameters:
                self.parameters[name] = parameter
                self.original[name] = parameter.data.clone()
                self.shown[name] = None
        owned = self.values.setdefault(adapter, {})
        owned.update({name: p.data.clone() for name, p in parameters.items()})

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
            name: self.parameters[name].data if self.shown[name] == adapter else value
            for name, value in self.values.get(adapter, {}).items()
        }

    def drop(self, adapter: str) -> None:
        """Forget the values of `adapter`; the caller then shows what is left."""
        for name in self.values.pop(adapter, {}):
            if self.shown[name] == adapter:
                self.parameters[name].data = self.original[name].to(self.parameters[name])
                self.shown[name] = None

    def _slot(self, adapter: str | None) -> Values:
        return self.original if adapter is None else self.values[adapter]
