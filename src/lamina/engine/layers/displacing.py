"""Layers whose base weight an initialisation changed, and how it gets its weight back.

PiSSA and its like move a part of the base into the adapter: `W' = W - s B0 A0`. What was moved is
kept with the layer, on the CPU, so that the base answers as before wherever the adapter doesn't
take part, and gets its weight back, bit for bit, when the adapter goes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.engine.dtypes import accumulation_dtype, to_adapter_input
from lamina.engine.layers.folding import Folding
from lamina.engine.ops.dispatch import lora_linear, lora_linear_delta
from lamina.engine.state import AdapterState
from lamina.errors import FoldError


@dataclass(frozen=True)
class Displaced:
    """What an adapter's initialisation took out of a base weight: `scaling * B @ A`.

    Attributes:
        A: r x in, as the adapter began, on the CPU.
        B: out x r.
        scaling: as it was then.
        becomes: the base's new weight, where it is not just the old one without the update.
        original: what the base held before, as stored, on the CPU; None where it wasn't kept.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    becomes: torch.Tensor | None
    original: Any

    @property
    def is_low_rank(self) -> bool:
        """Whether the base lacks the update, and nothing else."""
        return self.becomes is None

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """`scaling * B(A(x))`: what the base's output lacks."""
        a, b = self.A.to(x.device), self.B.to(x.device)
        return lora_linear(to_adapter_input(x, a.dtype), a, b, None, self.scaling)


class Displacing(Folding):
    """A layer whose base weight may have been changed when an adapter began."""

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__(base_layer, state)
        # adapter -> what it displaced, in the order in which that happened.
        self.displaced: dict[str, Displaced] = {}

    @torch.no_grad()
    def displace(self, adapter: str, becomes: torch.Tensor | None = None) -> None:
        """Take an adapter's update out of the base's weight, or set the weight to `becomes`.

        The update is that of the factors as they are stored, so that the sum is the weight again
        up to one rounding.
        """
        a, b = (factor.detach().cpu().clone() for factor in self.factors(adapter))
        taken = Displaced(a, b, self.records[adapter].scaling, becomes, None)
        self.take(adapter, taken)

    @torch.no_grad()
    def take(self, adapter: str, taken: Displaced) -> None:
        """Take out of the base's weight what was taken before, and was given back."""
        self._while_unfolded(lambda: self._take(adapter, taken))

    def take_out(self, adapter: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """Take `B @ A` out of the base's weight, for an adapter that needs it gone."""
        self.take(adapter, Displaced(A.cpu().clone(), B.cpu().clone(), 1.0, None, None))

    def _take(self, adapter: str, taken: Displaced) -> None:
        view = self.weight_view
        if taken.becomes is not None:
            values = taken.becomes.to(view.device)
        else:
            stored = view.read()
            values = stored.to(accumulation_dtype(stored.dtype)) - self._update_of(taken)
        before = view.swap(values)
        keep = not self.adapter_state.changes_stay
        becomes = None if taken.becomes is None else taken.becomes.cpu()
        self.displaced[adapter] = Displaced(
            taken.A, taken.B, taken.scaling, becomes, _to_cpu(before) if keep else None
        )

    def _update_of(self, taken: Displaced) -> torch.Tensor:
        device = self.weight_view.device
        delta = lora_linear_delta(taken.A.to(device), taken.B.to(device), taken.scaling)
        return delta.T if getattr(self, "fan_in_fan_out", False) else delta

    @torch.no_grad()
    def taken_out(self, names: Collection[str]) -> torch.Tensor | None:
        """What these adapters took out of the base's weight, in sum; None if that is nothing."""
        if self.adapter_state.changes_stay:
            return None
        found = [t for name, t in self.displaced.items() if name in names and t.is_low_rank]
        parts = [self._update_of(taken) for taken in found]
        return sum(parts[1:], start=parts[0]) if parts else None

    def weight_for(self, adapter: str) -> torch.Tensor:
        """The base's dense values, with what others than `adapter` took out of it; don't write."""
        weight = self.unfolded_weight()
        others = self.taken_out(self.displaced.keys() - {adapter}) if self.displaced else None
        return weight if others is None else weight.to(others.dtype) + others

    def lent(self, names: Sequence[str]) -> torch.Tensor | None:
        # A sum comes to the same without it, and isn't rounded.
        if not self.displaced or all(self.records[name].variant.is_sum for name in names):
            return None
        return self.taken_out(self.displaced.keys() - {*names, *self.merged_adapters})

    @torch.no_grad()
    def give_back(self, adapter: str) -> None:
        """Give the base back what an adapter took; bit for bit where no other took anything."""
        if adapter not in self.displaced:
            return
        if self.displaced[adapter].original is None:
            del self.displaced[adapter]
            return
        self._while_unfolded(lambda: self._give(adapter))

    def _give(self, adapter: str) -> None:
        names = list(self.displaced)
        later = {name: self.displaced[name] for name in names[names.index(adapter) + 1 :]}
        self.weight_view.restore(self.displaced.pop(adapter).original)
        for name, taken in later.items():
            del self.displaced[name]
            self._take(name, taken)

    def _while_unfolded(self, change: Callable[[], None]) -> None:
        """Change the base's weight below what is folded into it, where that can be taken out."""
        folded = list(self.merged_adapters)
        if not folded or not self.can_unfold:
            change()
            return
        self.unfold()
        change()
        self.fold(folded)

    def lacking(self) -> Iterator[Displaced]:
        """What the base lacks now, because the adapters that hold it don't take part."""
        if self.adapter_state.changes_stay:
            return
        present = {*self.contributing_names(), *self.merged_adapters}
        for name, taken in self.displaced.items():
            if name not in present and taken.is_low_rank:
                yield taken

    def initialise(self, name: str, init: bool | str) -> None:
        self.give_back(name)
        super().initialise(name, init)

    def delete_adapter(self, name: str) -> None:
        if name in self.merged_adapters:
            raise FoldError(
                f"The adapter {name!r} is folded into the base weights.",
                cure="model.unmerge_adapter() first",
            )
        self.give_back(name)
        super().delete_adapter(name)


def _to_cpu(stored: Any) -> Any:
    return stored.cpu() if isinstance(stored, torch.Tensor) else stored
