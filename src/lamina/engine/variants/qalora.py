"""QA-LoRA: A sees the means of groups of features, as a quantiser's groups have one zero point.

Source: arXiv:2309.14717.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.engine.dtypes import accumulation_dtype
from lamina.engine.variants.base import Update, Variant


class QALora(Variant):
    """`y = base(x) + scaling * B(A(groups * mean_of_groups(dropout(x))))`, A: r x groups."""

    def why_not(self, kind: str, base: nn.Module, config: Any, target: str) -> str | None:
        reason = super().why_not(kind, base, config, target)
        if reason:
            return reason
        features, size = int(getattr(base, "in_features", 0)), config.qalora_group_size
        if features % size:
            return (
                f"`use_qalora=True` requires `module.in_features` ({features}) to be divisible by "
                f"'qalora_group_size' ({size})"
            )
        if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
            return f"init_lora_weights={config.init_lora_weights!r} needs an A as wide as the layer"
        return None

    def prepare(self, layer: Update, adapter: str, dtype: torch.dtype) -> None:
        held: Any = layer
        made = held.lora_A[adapter]
        groups = made.in_features // layer.records[adapter].config.qalora_group_size
        held.lora_A[adapter] = nn.Linear(
            groups, made.out_features, bias=False, device="meta", dtype=dtype
        )

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        A_RG = layer.factors(adapter)[0]
        groups = A_RG.shape[1]
        means = layer.dropped(adapter, x).unflatten(-1, (groups, -1)).mean(-1)
        return result + layer.update(adapter, means * groups)

    def delta(self, layer: Update, adapter: str) -> torch.Tensor:
        record = layer.records[adapter]
        A_RG, B_OR = layer.factors(adapter)
        size = record.config.qalora_group_size
        dtype = accumulation_dtype(A_RG.dtype)
        A_RI = (A_RG.to(dtype) * (A_RG.shape[1] / size)).repeat_interleave(size, dim=1)
        dense: torch.Tensor = (B_OR.to(dtype) @ A_RI) * record.scaling
        return dense.T if getattr(layer, "fan_in_fan_out", False) else dense
