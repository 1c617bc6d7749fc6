"""The low-rank update written down plainly: the oracle that every faster path is compared with.

Shape suffixes: x_TI has tokens x in, A_RI is rank x in, B_OR is out x rank; y is (..., out).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Entries of a matrix that are made at a time: no temporary is larger.
_BLOCK = 2**20


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
    a, b = A_RI.to(dtype), B_OR.to(dtype)
    step = rows_at_a_time(a.shape[1])
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return (b @ a) * scaling
    delta = b.new_empty(b.shape[0], a.shape[1])
    for i in range(0, b.shape[0], step):
        torch.mul(_apart(b[i : i + step]) @ a, scaling, out=delta[i : i + step])
    return delta


def rows_at_a_time(columns: int) -> int:
    """How many rows of a large matrix are made at a time.

    A product's last bits depend on how many rows it has. Whoever makes a part of a matrix gets the
    bits of the whole by beginning at a multiple of this.
    """
    return max(1, _BLOCK // max(1, columns))


def _apart(rows: torch.Tensor) -> torch.Tensor:
    # Also on where they begin in memory.
    return rows.clone(memory_format=torch.contiguous_format)
