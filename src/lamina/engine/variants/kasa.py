"""KaSA: the base without its least singular directions, and a learned diagonal between B and A.

Source: arXiv:2412.06071.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.config import numbers
from lamina.engine.dtypes import accumulation_dtype
from lamina.engine.variants.base import Update, Variant

_PLACE = "lora_diag"


class Kasa(Variant):
    """`y = base'(x) + scaling * B(d * A(dropout(x)))`, with d (r) and the base' of rank k - r.

    k is the smaller side of the base's weight; what is taken out of it is kept like what an
    initialisation takes out, so that the base can have it back.
    """

    places = (_PLACE,)
    changes_base = True

    def why_not(self, kind: str, base: nn.Module, config: Any, target: str) -> str | None:
        reason = super().why_not(kind, base, config, target)
        if reason:
            return reason
        if not isinstance(base, nn.Linear):
            return (
                "KaSA does not support `fan_in_fan_out=True` layers (e.g. Conv1D), nor any but "
                "nn.Linear"
            )
        r, k = numbers(config, target)[0], min(base.in_features, base.out_features)
        if r >= k:
            return (
                f"KaSA requires `r` ({r}) to be smaller than min(in_features, out_features) ({k}), "
                "so that something of the base is left"
            )
        return None

    def prepare(self, layer: Update, adapter: str, dtype: torch.dtype) -> None:
        held: Any = layer
        if not isinstance(getattr(held, _PLACE, None), nn.ParameterDict):
            setattr(held, _PLACE, nn.ParameterDict())
        r = layer.records[adapter].r
        getattr(held, _PLACE)[adapter] = nn.Parameter(torch.empty(r, device="meta", dtype=dtype))

    @torch.no_grad()
    def begin(self, layer: Update, adapter: str) -> None:
        nn.init.normal_(_diagonal(layer, adapter))
        held: Any = layer
        if adapter in held.displaced:
            return
        weight = layer.weight_view.read()
        r = layer.records[adapter].r
        left, values, right = torch.linalg.svd(
            weight.to(accumulation_dtype(weight.dtype)), full_matrices=False
        )
        held.take_out(adapter, right[-r:], left[:, -r:] * values[-r:])

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        held: Any = layer
        low = held.lora_A[adapter](layer.dropped(adapter, x)) * _diagonal(layer, adapter)
        update: torch.Tensor = held.lora_B[adapter](low) * layer.records[adapter].scaling
        return result + update

    def delta(self, layer: Update, adapter: str) -> torch.Tensor:
        a, b = layer.factors(adapter)
        dtype = accumulation_dtype(a.dtype)
        scaled = b.to(dtype) * _diagonal(layer, adapter).to(dtype)
        dense: torch.Tensor = (scaled @ a.to(dtype)) * layer.records[adapter].scaling
        return dense


def kasa_penalty(layer: Any, adapter: str) -> torch.Tensor:
    """`beta * |d|^2 + gamma * (|B.T B - I| + |A A.T - I|)` of one layer, in fp32.

    Source: arXiv:2412.06071, equations 9 to 11.
    """
    settings = layer.records[adapter].config.kasa_config
    d = _diagonal(layer, adapter).float()
    a, b = (factor.float() for factor in layer.factors(adapter))
    one = torch.eye(d.shape[0], device=d.device)
    apart = torch.linalg.norm(b.T @ b - one) + torch.linalg.norm(a @ a.T - one)
    penalty: torch.Tensor = settings.beta * d.square().sum() + settings.gamma * apart
    return penalty


def _diagonal(layer: Any, adapter: str) -> torch.Tensor:
    diagonal: torch.Tensor = getattr(layer, _PLACE)[adapter]
    return diagonal
