"""The low-rank update written down plainly: the oracle that every faster path is compared with.

Shape suffixes: x_TI has tokens x in, A_RI is rank x in, B_OR is out x rank; y is (..., out).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def lora_linear(
    x_TI: torch.Tensor,
    A_RI: torch.Tensor,
    B_OR: torch.Tensor,
    bias_O: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """`scaling * (x @ A.T @ B.T + bias)`: shape (..., out), in the dtype of the factors.

    Source: arXiv:2106.09685, section 4.1.
    """
    return F.linear(F.linear(x_TI, A_RI), B_OR, bias_O) * scaling


def lora_linear_delta(A_RI: torch.Tensor, B_OR: torch.Tensor, scaling: float) -> torch.Tensor:
    """The dense update `scaling * B @ A`: shape (out, in), summed in at least fp32."""
    dtype = torch.float64 if A_RI.dtype == torch.float64 else torch.float32
    return (B_OR.to(dtype) @ A_RI.to(dtype)) * scaling
