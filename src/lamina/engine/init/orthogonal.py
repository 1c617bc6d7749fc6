"""Orthogonal: both factors random, their product zero."""

from __future__ import annotations

import torch
from torch import nn

from lamina.engine.init.base import Begun, Fault, Numbers
from lamina.engine.init.matrices import put, rounded
from lamina.engine.init.standard import kaiming


def orthogonal(layer: Begun, adapter: str) -> None:
    """A from the even rows of a random rotation (r x r), B from its odd rows, so `B A = 0`.

    Embeddings begin as ever. Source: https://datta0.github.io/posts/rethink-lora-init/
    """
    if layer.is_embedding:
        kaiming(layer, adapter)
        return
    A, B = layer.factors(adapter)
    r = A.shape[0]
    # On the CPU, so that a seed means the same numbers wherever the model lies.
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A_RI = (torch.randn(A.shape[1], r // 2) @ Q[0::2]).T / 10
    B_OR = torch.randn(r // 2, B.shape[0]).T @ Q[1::2] / 10
    dtype = layer.weight_view.dtype
    put(layer, adapter, rounded(A_RI, dtype), rounded(B_OR, dtype))


def why_not(kind: str, base: nn.Module, record: Numbers) -> Fault | None:
    """Rotations are halved."""
    if kind != "linear" or record.r % 2 == 0:
        return None
    return Fault(
        f"Orthogonal initialization requires the LoRA rank to be even, got {record.r} instead.",
        "an even r, in rank_pattern too",
    )
