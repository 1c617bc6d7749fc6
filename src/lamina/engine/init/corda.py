"""CorDA: the adapter begins as the part of the base that the inputs' covariance picks out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lamina.engine.init.base import Begun, Fault, Numbers
from lamina.engine.init.matrices import put, unreadable
from lamina.engine.init.standard import kaiming
from lamina.engine.weights import weight_of

# Where the preprocessing leaves a layer's decomposition.
ATTRIBUTE = "eigens"
_CURE = "preprocess_corda(model, lora_config, run_model) on this model, with this very config"


@dataclass
class CordaEigens:
    """A decomposition `W = U diag(S) V.T`, cut to the adapter's rank.

    Attributes:
        S_WC: singular values of `W C`, with C the inputs' covariance; r.
        U_WC: its left singular vectors; out x r.
        V_WC: its right ones, multiplied by the inverse of C; in x r.
    """

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


def corda(layer: Begun, adapter: str) -> None:
    """`B = U sqrt(S/s)`, `A = sqrt(S/s) V.T`, and W becomes `W - s B A`. Embeddings: as ever.

    Source: arXiv:2406.05223.
    """
    if layer.is_embedding:
        kaiming(layer, adapter)
        return
    eigens: CordaEigens = getattr(layer.base_layer, ATTRIBUTE)
    device = layer.weight_view.device
    root = (eigens.S_WC.to(device) / layer.records[adapter].scaling).sqrt()
    A_RI = root[:, None] * eigens.V_WC.to(device).T
    put(layer, adapter, A_RI, eigens.U_WC.to(device) * root)
    layer.displace(adapter)
    delattr(layer.base_layer, ATTRIBUTE)


def why_not(kind: str, base: nn.Module, record: Numbers) -> Fault | None:
    """The decomposition has to be there, whole, and of this adapter's rank."""
    if kind != "linear" or weight_of(base).device.type == "meta":
        return None
    eigens = getattr(base, ATTRIBUTE, None)
    if eigens is None:
        return Fault(
            "`eigens` attribute not found for layer, please run `preprocess_corda` first", _CURE
        )
    parts = {"S": eigens.S_WC, "U": eigens.U_WC, "V": eigens.V_WC}
    broken = [name for name, part in parts.items() if not bool(torch.isfinite(part).all())]
    if broken:
        return Fault(f"Invalid value found in matrix {', '.join(broken)}", _CURE)
    if any(part.shape[-1] != record.r for part in parts.values()):
        ranks = {name: part.shape[-1] for name, part in parts.items()}
        return Fault(
            f"size mismatch: its decomposition was cut to {ranks}, r is {record.r} here", _CURE
        )
    return unreadable("CorDA", base, dense=True)
