"""LoRA on `nn.MultiheadAttention`: on its joint input projection and on its output projection."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lamina.engine.layers.base import LayerAdapter, LoraLayer
from lamina.engine.layers.linear import Linear
from lamina.engine.layers.low_rank_sum import LowRankSum, Term, in_place_of
from lamina.engine.layers.mixing import refuse_rows, routing_of
from lamina.engine.ops.dispatch import lora_linear_delta
from lamina.engine.state import AdapterState
from lamina.engine.weights.parameter import ParameterWeight

# PEFT adds the update of the output projection twice whenever it runs or merges an attention. Its
# files were trained so, and answer as they did only if this does the same.
_COUNTS = 2


class OutProjection(Linear):
    """The output projection inside an attention: `W' = W + 2 * scaling * B @ A`, as PEFT has it."""

    def delta_weight(self, adapter: str) -> torch.Tensor:
        return super().delta_weight(adapter) * _COUNTS


class MultiheadAttention(LoraLayer):
    """`W' = W + scaling * B @ A` for `in_proj_weight` (3 * embed x embed) and for `out_proj`.

    torch's module reads both weights and calls neither layer; while it runs, a `LowRankSum` stands
    where each was, so that nothing is merged. A of the input projection is (r x embed), B is
    (3 * embed x r); `out_proj` is an adapted linear layer of its own, with the same numbers.
    """

    kind = "attention"
    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__(base_layer, state)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        base: Any = base_layer
        self.in_features, self.out_features = int(base.embed_dim), 3 * int(base.embed_dim)
        if not isinstance(base.out_proj, LoraLayer):
            base.out_proj = OutProjection(base.out_proj, state)

    @classmethod
    def why_not(cls, base_layer: nn.Module) -> str | None:
        if not getattr(base_layer, "_qkv_same_embed_dim", True):
            return (
                "Only same embed for query/key/value is supported as of now for "
                f"{cls.__name__}: its kdim or vdim differs from embed_dim"
            )
        return None

    @property
    def weight_view(self) -> ParameterWeight:
        return ParameterWeight(self.base_layer, "in_proj_weight")

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # A layer around this one asks before it takes its fast path.
        same: bool = self.base_layer._qkv_same_embed_dim
        return same

    @property
    def out_proj(self) -> nn.Module:
        """The output projection, without updates."""
        layer: Any = self.base_layer.out_proj
        base: nn.Module = layer.get_base_layer()
        return base

    def _restore_weights(self) -> None:
        """Nothing to restore: no weight of the base is ever taken away."""

    def add_factors(self, name: str, record: LayerAdapter, dtype: torch.dtype) -> None:
        meta: dict[str, Any] = {"bias": False, "device": "meta", "dtype": dtype}
        self.lora_A[name] = nn.Linear(self.in_features, record.r, **meta)
        self.lora_B[name] = nn.Linear(record.r, self.out_features, **meta)

    def add_adapter(
        self,
        name: str,
        record: LayerAdapter,
        *,
        init: bool | str | None = True,
        upcast: bool = True,
    ) -> None:
        """Add an adapter to both projections."""
        super().add_adapter(name, record, init=init, upcast=upcast)
        target = f"{record.target}.out_proj" if record.target else "out_proj"
        self.base_layer.out_proj.add_adapter(
            name, replace(record, target=target), init=init, upcast=upcast
        )

    def update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """There is no such input: torch's function multiplies by the whole weight."""
        raise NotImplementedError

    def delta_weight(self, adapter: str) -> torch.Tensor:
        return lora_linear_delta(*self.factors(adapter), self.records[adapter].scaling)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What torch's module gives with the sums in the weights' places.

        Raises:
            RoutingError: the rows of the batch are to go to different adapters.
        """
        refuse_rows(self, routing_of(self, kwargs))
        with ExitStack() as stack:
            self._stand_in(stack)
            return self.base_layer(*args, **kwargs)

    def _stand_in(self, stack: ExitStack) -> None:
        base, out = self.base_layer, self.base_layer.out_proj
        if self.contributing():
            summed = _summed(self, base.in_proj_weight)
            stack.enter_context(in_place_of(base, "in_proj_weight", summed))
        if out.contributing():
            view = SimpleNamespace(weight=_summed(out, out.weight, _COUNTS), bias=out.bias)
            stack.enter_context(in_place_of(base, "out_proj", view))


def _summed(layer: LoraLayer, weight: torch.Tensor, times: int = 1) -> LowRankSum:
    """A weight (out x in) with the updates of the layer's contributing adapters, `times` each."""
    terms = []
    for name in layer.contributing():
        a, b = layer.factors(name)
        scaling = layer.records[name].scaling * times
        terms.append(Term(b, a, scaling, layer.lora_dropout[name]))
    return LowRankSum(weight, terms)
