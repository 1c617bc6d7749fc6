"""BD-LoRA: A or B block-diagonal, so that shards of a served model needn't exchange anything.

Source: arXiv:2510.23346.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.config import numbers
from lamina.engine.dtypes import accumulation_dtype
from lamina.engine.variants.base import Update, Variant


class BlockDiagonalLinear(nn.Module):
    """`y = x @ blockdiag(W_1 ... W_n).T`.

    Args:
        in_features: of the whole.
        out_features: of the whole.
        nblocks: how many blocks, which divides both.
        init_zero: begin with zeros, rather than as a linear layer.
        dtype: of the weight, which stores the blocks one below the other: out x in/nblocks.
        device: where it lies.

    Raises:
        ValueError: the blocks don't come out even.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        super().__init__()
        if in_features % nblocks or out_features % nblocks:
            raise ValueError(
                f"in_features={in_features} or out_features={out_features} is not divisible by "
                f"{nblocks}"
            )
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features // nblocks, dtype=dtype, device=device)
        )
        if init_zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each block of the output from its block of the input."""
        blocks = x.unflatten(-1, (self.nblocks, -1)).unsqueeze(-2)
        weight_NOI = self.weight.unflatten(0, (self.nblocks, -1))
        output: torch.Tensor = blocks @ weight_NOI.transpose(-1, -2)
        return output.squeeze(-2).flatten(-2)

    def weight_as_blockdiagonal_matrix(self) -> torch.Tensor:
        """The whole weight, out x in, with zeros between the blocks."""
        whole: torch.Tensor = torch.block_diag(*self.weight.chunk(self.nblocks))
        return whole


class BdLora(Variant):
    """`y = base(x) + scaling * B(A(dropout(x)))`, with A or B block-diagonal in most layers."""

    def why_not(self, kind: str, base: nn.Module, config: Any, target: str) -> str | None:
        reason = super().why_not(kind, base, config, target)
        if reason:
            return reason
        try:
            side = _side(config.use_bdlora, target)
        except ValueError as error:
            return str(error)
        if side is None:
            return None
        r, nblocks = numbers(config, target)[0], config.use_bdlora.nblocks
        features: Any = base.in_features if side == "A" else base.out_features
        if r % nblocks or int(features) % nblocks:
            return f"r={r} or its {features} features are not divisible by nblocks={nblocks}"
        if config.lora_bias and side == "B":
            return "a block-diagonal B has no bias (lora_bias=True)"
        return None

    def prepare(self, layer: Update, adapter: str, dtype: torch.dtype) -> None:
        record = layer.records[adapter]
        side = _side(record.config.use_bdlora, record.target)
        held: Any = layer
        for name, place in (("A", held.lora_A), ("B", held.lora_B)):
            if side == name:
                made = place[adapter]
                place[adapter] = BlockDiagonalLinear(
                    made.in_features,
                    made.out_features,
                    record.config.use_bdlora.nblocks,
                    dtype=dtype,
                    device="meta",
                )

    def begin(self, layer: Update, adapter: str) -> None:
        A = layer.factors(adapter)[0]
        if isinstance(_part(layer, "lora_A", adapter), BlockDiagonalLinear):
            nn.init.kaiming_uniform_(A)

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        low = _part(layer, "lora_A", adapter)(layer.dropped(adapter, x))
        update: torch.Tensor = _part(layer, "lora_B", adapter)(low) * layer.records[adapter].scaling
        return result + update

    def delta(self, layer: Update, adapter: str) -> torch.Tensor:
        a, b = (_whole(_part(layer, place, adapter)) for place in ("lora_A", "lora_B"))
        dtype = accumulation_dtype(a.dtype)
        dense: torch.Tensor = (b.to(dtype) @ a.to(dtype)) * layer.records[adapter].scaling
        return dense.T if getattr(layer, "fan_in_fan_out", False) else dense


def _part(layer: Any, place: str, adapter: str) -> Any:
    return getattr(layer, place)[adapter]


def _whole(part: nn.Module) -> torch.Tensor:
    if isinstance(part, BlockDiagonalLinear):
        return part.weight_as_blockdiagonal_matrix()
    weight: Any = part.weight
    return torch.as_tensor(weight)


def _side(settings: Any, target: str) -> str | None:
    """Which factor of a layer is block-diagonal.

    Raises:
        ValueError: both, or neither where all targets have to have one.
    """
    in_A = any(part in target for part in settings.target_modules_bd_a or ())
    in_B = any(part in target for part in settings.target_modules_bd_b or ())
    if in_A and in_B:
        raise ValueError(f"Target {target} matches both A and B block-diagonal patterns")
    if settings.match_strict and not (in_A or in_B):
        raise ValueError(
            f"Target {target} matches neither A nor B block-diagonal patterns; "
            "match_strict=False adapts it by plain LoRA"
        )
    return "A" if in_A else "B" if in_B else None
