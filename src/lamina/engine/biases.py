"""Biases of the base that an adapter trains along (`bias="all"` or `"lora_only"`).

PEFT's format stores them under the base's own names, and optimizers hold the base's own
parameters. So the values are swapped in and out of those parameters, by reference: the parameter
object stays, its data changes. The base's values come back whenever no adapter owns the biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

Values = dict[str, torch.Tensor]


@dataclass(eq=False)
class TrainedBiases:
    """The biases that adapters own, by their names in the model (without `base_layer`).

    Attributes:
        parameters: the base's bias parameters that any adapter has trained.
        values: adapter -> name -> values. The entry of `shown` is out of date while it is shown:
            the parameters hold the current values.
        asked: adapter -> the names that it trains. Its values may hold more: those that an earlier
            adapter trained, as they were when it was added.
        original: the base's own values, likewise out of date while nobody is shown.
        shown: the adapter whose values are in the parameters now, or None.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)
    asked: dict[str, frozenset[str]] = field(default_factory=dict)
    original: Values = field(default_factory=dict)
    shown: str | None = None

    def adopt(self, adapter: str, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give `adapter` its own copies of these biases, starting from what they are now."""
        new = {name: p for name, p in parameters.items() if name not in self.parameters}
        for name, parameter in new.items():
            self.parameters[name] = parameter
            self.original[name] = parameter.data.clone()
            for owned in self.values.values():
                owned.setdefault(name, parameter.data.clone())
        self.asked[adapter] = self.asked.get(adapter, frozenset()) | frozenset(parameters)
        self.values[adapter] = {
            name: parameter.data.clone() for name, parameter in self.parameters.items()
        }

    def show(self, adapter: str | None) -> None:
        """Put the values of `adapter` (None: the base's) into the parameters."""
        if adapter == self.shown:
            return
        self._slot(self.shown).update({n: p.data for n, p in self.parameters.items()})
        incoming = self._slot(adapter)
        for name, parameter in self.parameters.items():
            parameter.data = incoming[name].to(device=parameter.device, dtype=parameter.dtype)
        self.shown = adapter

    def of(self, adapter: str) -> Values:
        """The current values of `adapter`; empty if it owns none."""
        if adapter not in self.values:
            return {}
        if adapter == self.shown:
            return {name: parameter.data for name, parameter in self.parameters.items()}
        return dict(self.values[adapter])

    def assign(self, adapter: str, values: Values) -> None:
        """Set values of biases that `adapter` owns."""
        for name, value in values.items():
            current = self.of(adapter)[name]
            current.copy_(value.to(current.dtype))

    def drop(self, adapter: str) -> None:
        """Forget the values of `adapter`; the caller shows another first."""
        if adapter == self.shown:
            self.show(None)
        self.values.pop(adapter, None)
        self.asked.pop(adapter, None)

    def _slot(self, adapter: str | None) -> Values:
        return self.original if adapter is None else self.values[adapter]


def owner(biases: TrainedBiases, contributing: tuple[str, ...]) -> str | None:
    """The adapter whose biases count: the last contributing one that owns any."""
    return next((name for name in reversed(contributing) if name in biases.values), None)
