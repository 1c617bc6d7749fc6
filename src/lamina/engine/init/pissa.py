"""PiSSA: the adapter begins as the base's principal part, and the base keeps the rest."""

from __future__ import annotations

import re

import torch

from lamina.engine.init.base import Begun
from lamina.engine.init.matrices import matrix, put
from lamina.engine.init.standard import kaiming

# A hundred iterations are more than enough; a name from a file might ask for a million.
NAMES = r"pissa(_niter_\d{1,3})?"


def pissa(layer: Begun, adapter: str) -> None:
    """`W = U S V.T`; `B = U_r sqrt(S_r/s)`, `A = sqrt(S_r/s) V_r.T`, and W becomes `W - s B A`.

    `pissa_niter_N` finds the factors by N subspace iterations on random vectors, so that they
    (and the residual base) depend on the seed. Embeddings begin as ever.

    Source: arXiv:2404.02948.
    """
    if layer.is_embedding:
        kaiming(layer, adapter)
        return
    record = layer.records[adapter]
    W_OI = matrix(layer)
    found = re.search(r"niter_(\d+)", str(record.config.init_lora_weights).lower())
    if found:
        U, S, V = torch.svd_lowrank(W_OI, record.r, niter=int(found[1]))
        Vh = V.T
    else:
        U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
    root = (S[: record.r] / record.scaling).sqrt()
    put(layer, adapter, root[:, None] * Vh[: record.r], U[:, : record.r] * root)
    layer.displace(adapter)
