"""MiCA: B is the base's minor directions and stays so; A begins at zero and is trained."""

from __future__ import annotations

import torch
from torch import nn

from lamina.engine.init.base import Begun, Fault, Numbers
from lamina.engine.init.matrices import matrix, put, rounded, too_high, unreadable


def mica(layer: Begun, adapter: str) -> None:
    """`W = U S V.T`; B (out x r) are the last r columns of U, A is zero.

    Source: arXiv:2604.01694.
    """
    r = layer.records[adapter].r
    U, _, _ = torch.linalg.svd(matrix(layer), full_matrices=False)
    A, _ = layer.factors(adapter)
    put(layer, adapter, torch.zeros_like(A), rounded(U[:, -r:], layer.weight_view.dtype))


def why_not(kind: str, base: nn.Module, record: Numbers) -> Fault | None:
    """What keeps a layer from beginning so."""
    if kind not in ("linear", "embedding"):
        return None
    return unreadable("MiCA", base, dense=False) or too_high("MiCA", base, record.r)
