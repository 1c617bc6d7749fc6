"""OLoRA: the adapter begins orthonormal, by a QR decomposition of the base."""

from __future__ import annotations

import torch

from lamina.engine.init.base import Begun
from lamina.engine.init.matrices import matrix, put
from lamina.engine.init.standard import kaiming


def olora(layer: Begun, adapter: str) -> None:
    """`W = Q R`; `B = Q[:, :r]`, `A = R[:r]`, and W becomes `W - s B A`. Embeddings: as ever.

    Source: arXiv:2406.01775.
    """
    if layer.is_embedding:
        kaiming(layer, adapter)
        return
    r = layer.records[adapter].r
    Q, R = torch.linalg.qr(matrix(layer))
    put(layer, adapter, R[:r], Q[:, :r])
    layer.displace(adapter)
