"""Fold adapters into a layer's base weight, and take them out again bit-exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lamina.engine.dtypes import accumulation_dtype, exact
from lamina.engine.layers.holding import AdapterHolder
from lamina.engine.state import AdapterState
from lamina.errors import FoldError


class Folding(AdapterHolder):
    """A layer whose adapters can be folded into its base weight."""

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__(base_layer, state)
        # What the base held before anything was folded in: "weight" as it was stored, "bias".
        self._unfolded: dict[str, Any] = {}

    def why_not_foldable(self, names: Sequence[str]) -> str | None:
        """None if these adapters can be folded into this layer, else the reason."""
        return self.why_not_summable(names) or self.weight_view.why_not_writable

    def why_not_rounded(self, requantise: bool | None) -> str | None:
        """None if the base holds what is folded in as it is, or may round it; else the reason.

        Args:
            requantise: whether a quantised base may round the sum; None asks the shared state.
        """
        quantised = self.weight_view.quantised
        allowed = self.adapter_state.requantise if requantise is None else requantise
        if quantised is None or allowed:
            return None
        return f"its weight is quantised ({quantised}), so that the sum would be rounded again"

    def why_not_summable(self, names: Sequence[str]) -> str | None:
        """None if a weight with these adapters added exists, else the reason."""
        lacks_bias = getattr(self.base_layer, "bias", None) is None
        if lacks_bias and any(self.records[name].lora_bias for name in names):
            # Code for PEFT looks for the first half.
            return (
                "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias "
                "that could take up that of lora_B"
            )
        reasons = (self.records[n].variant.why_not_foldable(self, n) for n in names)
        return next(filter(None, reasons), None)

    def is_finite(self, names: Sequence[str]) -> bool:
        """Whether neither NaN nor infinity comes out when these adapters are folded in."""
        dtype = self.weight_view.value_dtype
        parts = (part.to(dtype) for part in self.folded(names) if part is not None)
        return all(bool(torch.isfinite(part).all()) for part in parts)

    def unfolded_weight(self) -> torch.Tensor:
        """The base's dense values without the adapters that are folded in; don't write.

        What was folded in without being kept is a part of the base.
        """
        view = self.weight_view
        if "weight" in self._unfolded:
            return view.values_of(self._unfolded["weight"]).to(view.device)
        return view.read()

    @torch.no_grad()
    def folded(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias with these adapters added, in the accumulation dtype, not yet rounded.

        Where the unfolded weight was kept, the sum starts from there, so that folding adapters
        one by one rounds no more often than folding them at once.
        """
        stored = self.unfolded_weight()
        if "weight" in self._unfolded:
            names = [*self.merged_adapters, *names]
        weight = stored.to(accumulation_dtype(stored.dtype), copy=True)
        with exact(weight.device):
            lent = self.lent(names)
            if lent is not None:
                weight += lent
            for name in names:
                weight = self.records[name].variant.fold(self, name, weight)
            if lent is not None:
                weight -= lent
        return weight, self.folded_bias(names)

    def lent(self, names: Sequence[str]) -> torch.Tensor | None:
        """What has to be in the base's weight while these adapters are added, and not after."""
        return None

    def folded_bias(self, names: Sequence[str]) -> torch.Tensor | None:
        """The base's bias with those of these adapters' B added; None if they have none."""
        biased = [name for name in names if self.records[name].lora_bias]
        if not biased:
            return None
        stored = self._unfolded.get("bias", self.base_layer.bias.data)
        total: torch.Tensor = stored.to(accumulation_dtype(stored.dtype), copy=True)
        for name in biased:
            total += self.records[name].scaling * self.tensors(name)["lora_B.bias"].data
        return total

    @torch.no_grad()
    def fold(self, names: Sequence[str], *, keep_unfolded: bool = True) -> None:
        """Add adapters to the base weight: summed in fp32, rounded once.

        Args:
            names: adapters of this layer that are not folded in yet.
            keep_unfolded: hold on to the weight as it was, so that `unfold` gives it back
                bit-exactly; costs the memory of one weight.
        """
        weight, bias = self.folded(names)
        before: dict[str, Any] = {"weight": self.weight_view.swap(weight)}
        if bias is not None:
            before["bias"] = self.base_layer.bias.data
            self.base_layer.bias.data = bias.to(before["bias"].dtype)
        # What an earlier fold did not keep is lost: then there is nothing to go back to.
        if keep_unfolded and self.can_unfold:
            self._unfolded = {**before, **self._unfolded}
        if not self.merged_adapters:
            self.adapter_state.folded_layers += 1
        self.merged_adapters.extend(names)

    def follow(self, source: Folding, names: Sequence[str]) -> None:
        """Take note that a layer over the same weight has folded these adapters in for both."""
        self._unfolded = dict(source._unfolded)
        if not self.merged_adapters:
            self.adapter_state.folded_layers += 1
        self.merged_adapters.extend(names)

    @property
    def can_unfold(self) -> bool:
        """Whether `unfold` has what it needs."""
        return not self.merged_adapters or "weight" in self._unfolded

    @torch.no_grad()
    def unfold(self) -> None:
        """Give the base its weight back, bit for bit.

        Raises:
            FoldError: it was folded without keeping the weight.
        """
        if not self.can_unfold:
            raise FoldError(
                "The unfolded weight was not kept, so it can't be restored exactly.",
                cure="load the base model again, or fold with keep_unfolded=True",
            )
        if "weight" in self._unfolded:
            self.weight_view.restore(self._unfolded["weight"])
        if "bias" in self._unfolded:
            bias = self.base_layer.bias
            bias.data = self._unfolded["bias"].to(device=bias.device, dtype=bias.dtype)
        if self.merged_adapters:
            self.adapter_state.folded_layers -= 1
        self._unfolded = {}
        self.merged_adapters.clear()


def warn_of_rounding(layers: Iterable[Folding]) -> None:
    """Warn once if layers whose bits are too few to hold a sum unharmed are about to be folded."""
    found = (layer.weight_view.rounding for layer in layers)
    bits = sorted({bits for bits in found if bits})
    if bits:
        warnings.warn(
            f"Merged into {' and '.join(bits)} weights, the sum is rounded to them again: the "
            "model may get different generations due to rounding errors.",
            stacklevel=3,
        )
