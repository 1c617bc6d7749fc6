"""LoRA on `nn.Embedding`: a row of the table is looked up in A, and lifted by B."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from lamina.engine.layers.base import LayerAdapter, LoraLayer
from lamina.engine.ops.dispatch import lora_linear_delta
from lamina.engine.state import AdapterState


class Embedding(LoraLayer):
    """`y = base(ids) + scaling * A[:, ids].T @ B.T`, with A (r x vocabulary), B (dim x r).

    Dropout does not act here: ids can't be dropped.
    """

    factor_names = ("lora_embedding_A", "lora_embedding_B")
    kind = "embedding"

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__(base_layer, state)
        self.in_features = base_layer.num_embeddings
        self.out_features = base_layer.embedding_dim
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    def add_factors(self, name: str, record: LayerAdapter, dtype: torch.dtype) -> None:
        vocabulary, dim = self.base_layer.num_embeddings, self.base_layer.embedding_dim
        for place, shape in zip(
            self.factor_names, ((record.r, vocabulary), (dim, record.r)), strict=True
        ):
            getattr(self, place)[name] = nn.Parameter(
                torch.empty(shape, device="meta", dtype=dtype)
            )

    def dropped(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        return x

    def update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        a, b = self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        base = self.base_layer
        # Not with the base's max_norm: torch would shrink A itself, in place. Nor with its sparse:
        # the lookup is in A transposed, and a sparse gradient can't be transposed back.
        looked_up = F.embedding(
            x,
            a.T,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )
        update: torch.Tensor = (looked_up @ b.T) * self.records[adapter].scaling
        # Some models scale inside their embedding's forward; the update has to follow.
        scale = getattr(base, "embed_scale", None)
        return update if scale is None else update * torch.as_tensor(scale).to(update)

    def why_not_foldable(self, names: Sequence[str]) -> str | None:
        if self.base_layer.max_norm is not None:
            return "its rows would be shrunk to max_norm with the update in them"
        return super().why_not_foldable(names)

    def delta_weight(self, adapter: str) -> torch.Tensor:
        a, b = self.factors(adapter)
        return lora_linear_delta(b.T, a.T, self.records[adapter].scaling)
