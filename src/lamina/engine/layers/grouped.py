"""The low-rank product of rows that are sorted by expert, by the kernel that the base uses."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

# What the kernels ask of strides and row lengths, in bytes.
_ALIGNMENT = 16


def product(
    grouped_mm: Any,
    x_SP: torch.Tensor,
    left_EPR: torch.Tensor,
    right_ERQ: torch.Tensor,
    offs_E: torch.Tensor,
) -> torch.Tensor:
    """`x @ left[e] @ right[e]` for the rows of each expert e: shape (S, q).

    Args:
        grouped_mm: the kernel: `grouped_mm(x, weights, offs=offs)`.
        x_SP: the rows, sorted by expert.
        left_EPR: experts x p x r.
        right_ERQ: experts x r x q.
        offs_E: where each expert's rows end.
    """
    # The kernels multiply in one dtype, the base's; ranks of zeros make up for the alignment.
    missing = -left_EPR.shape[-1] % max(1, _ALIGNMENT // x_SP.element_size())
    left = F.pad(left_EPR.to(x_SP.dtype), (0, missing)).contiguous()
    right = F.pad(right_ERQ.mT.to(x_SP.dtype), (0, missing)).contiguous().mT
    inner = grouped_mm(x_SP, left, offs=offs_E)
    outer: torch.Tensor = grouped_mm(inner, right, offs=offs_E)
    return outer
