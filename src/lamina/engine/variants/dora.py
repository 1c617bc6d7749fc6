"""DoRA: LoRA changes the direction of each row of the weight, a trained magnitude its length.

Source: arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lamina.engine.dtypes import accumulation_dtype
from lamina.engine.variants.base import Update, Variant
from lamina.engine.variants.dora_norm import Magnitude, device_for, row_norms, state_of
from lamina.engine.weights import OpaqueWeight, weight_of

_PLACE = "lora_magnitude_vector"


class Dora(Variant):
    """`W' = m * (W + s * B @ A) / norm(W + s * B @ A)`, with a magnitude m for each row.

    A row is what makes one output: of a linear or convolution an output feature, of an embedding
    an entry of the vectors. The norm takes part in the forward as a constant (section 4.3), and
    m begins as the norm, so that a new adapter changes nothing. Where several adapters are active,
    the norm is that of the base's own weight, and m scales what the ones before have added too.
    """

    places = (_PLACE,)
    # So that PEFT's files of all times are read and written.
    spelling: Mapping[str, str] = {f"{_PLACE}.weight": _PLACE}
    kinds = ("linear", "embedding", "conv")

    def why_not(self, kind: str, base: nn.Module, config: Any, target: str) -> str | None:
        if kind not in self.kinds:
            what = "MultiheadAttention" if kind == "attention" else type(base).__name__
            return f"{what} does not support DoRA (yet), please set use_dora to False"
        if isinstance(weight_of(base), OpaqueWeight):
            return f"DoRA needs the norms of its weight, and a {type(base).__name__} can't be read"
        return None

    def prepare(self, layer: Update, adapter: str, dtype: torch.dtype) -> None:
        B_OR = layer.factors(adapter)[1]
        out, further = B_OR.shape[0], B_OR.dim() - 2
        shape = (1, out, *[1] * further) if layer.kind == "conv" else (out,)
        layer.place(_PLACE)[adapter] = Magnitude(shape, dtype).train(layer.training)

    @torch.no_grad()
    def begin(self, layer: Update, adapter: str) -> None:
        magnitude = self._magnitude(layer, adapter).weight
        where = device_for(layer.records[adapter].config, layer.weight_view.device)
        magnitude.copy_(self._norm(layer, adapter, where).view_as(magnitude))

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        dropped = layer.dropped(adapter, x)
        ratio = self._ratio(layer, adapter)
        update = layer.update(adapter, dropped)
        if layer.kind == "embedding":
            return ratio * result + ratio * update
        if layer.kind == "conv":
            ratio = ratio.view(-1, *[1] * (layer.factors(adapter)[0].dim() - 2))
        base = self._without_bias(layer, adapter, dropped, result)
        return result + (ratio - 1) * base + ratio * update

    def fold(self, layer: Update, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        ratio = self._ratio(layer, adapter).to(weight)
        if not _stored_in_by_out(layer):
            ratio = ratio.view(-1, *[1] * (weight.dim() - 1))
        return weight.add_(layer.delta_weight(adapter)).mul_(ratio)

    def _magnitude(self, layer: Update, adapter: str) -> Magnitude:
        magnitude: Any = layer.place(_PLACE)[adapter]
        assert isinstance(magnitude, Magnitude)
        return magnitude

    def _ratio(self, layer: Update, adapter: str) -> torch.Tensor:
        """`m / norm`, shape (out,); gradients reach m only."""
        magnitude = self._magnitude(layer, adapter)
        norm = magnitude.kept(
            lambda: self._key(layer, adapter), lambda: self._norm(layer, adapter)
        ).to(magnitude.weight.dtype)
        # A row of nothing has no direction.
        return magnitude.weight.flatten() / torch.where(norm == 0, torch.ones_like(norm), norm)

    def _norm(self, layer: Update, adapter: str, where: torch.device | None = None) -> torch.Tensor:
        """The norms; computed on the device `where`, if it isn't None."""
        a, b = (factor.detach().to(where) for factor in layer.factors(adapter))
        weight = layer.weight_for(adapter).detach().to(where)
        if _stored_in_by_out(layer):
            weight = weight.T
        A_RI, B_OR = a.flatten(1), b.flatten(1)
        scaling = layer.records[adapter].scaling
        if B_OR.shape[1] != A_RI.shape[0]:
            return _norms_of_groups(weight, A_RI, B_OR, scaling)
        return row_norms(weight.flatten(1), A_RI, B_OR, scaling)

    def _key(self, layer: Update, adapter: str) -> Hashable:
        tensors = (*layer.factors(adapter), getattr(layer.base_layer, "weight", None))
        record = layer.records[adapter]
        return (*map(state_of, tensors), record.scaling, layer.unfolded_weight().data_ptr())

    def _without_bias(
        self, layer: Update, adapter: str, dropped: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """What the base gives without its bias, for the input that A has."""
        base = layer.base_layer
        if layer.training and layer.records[adapter].p > 0:
            weight = layer.weight_for(adapter).to(dropped.dtype)
            if layer.kind == "conv":
                convolved: torch.Tensor = base._conv_forward(dropped, weight, None)
                return convolved
            return F.linear(dropped, weight.T if _stored_in_by_out(layer) else weight)
        bias: torch.Tensor | None = getattr(base, "bias", None)
        if bias is None:
            return result
        further = layer.factors(adapter)[0].dim() - 2 if layer.kind == "conv" else 0
        return result - bias.view(-1, *[1] * further)


def _stored_in_by_out(layer: Update) -> bool:
    return layer.kind == "embedding" or bool(getattr(layer, "fan_in_fan_out", False))


def _norms_of_groups(
    weight: torch.Tensor, A_RI: torch.Tensor, B_OR: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The norms where a convolution has groups, with B and A paired as PEFT pairs them.

    The update of such a layer mixes the groups, which a weight like the base's can't express; so
    this pairing is a convention, on which trained magnitudes rest.
    """
    dtype = accumulation_dtype(A_RI.dtype)
    paired = B_OR.to(dtype).reshape(-1, A_RI.shape[0]) @ A_RI.to(dtype)
    total = weight.to(dtype) + scaling * paired.reshape(weight.shape)
    norms: torch.Tensor = torch.linalg.vector_norm(total.flatten(1), dim=1)
    return norms
