"""LoRA on a parameter of a module (`target_parameters`), such as all experts of a layer at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lamina.engine.dtypes import accumulation_dtype
from lamina.engine.layers.base import LayerAdapter, LoraLayer
from lamina.engine.layers.low_rank_sum import LowRankSum, Term, in_place_of
from lamina.engine.layers.mixing import refuse_rows, routing_of
from lamina.engine.state import AdapterState
from lamina.engine.weights.parameter import ParameterWeight

# The ways of running experts whose products the factors can follow.
_FOLLOWED = (None, "eager", "batched_mm", "grouped_mm")


class ParamWrapper(LoraLayer):
    """`W_e' = W_e + scaling * B_e @ A_e` for each expert e of a parameter (experts, p, q).

    A is (experts * r x in), the ranks of an expert side by side; B is (out x r * experts), the
    experts of a rank side by side. `in` is q and `out` is p, except where the module says
    `is_transposed`: then the parameter holds (in, out). A parameter of two dimensions is one
    expert's (out, in).

    While the module runs, a `LowRankSum` stands where its parameter was. Several parameters of a
    module have a wrapper each, one inside the other: the one defined first is innermost.

    Args:
        base_layer: the module, or the wrapper of another parameter of it.
        state: the model's shared state.
        parameter_name: the parameter's name in the module.
    """

    kind = "experts"

    def __init__(self, base_layer: nn.Module, state: AdapterState, parameter_name: str) -> None:
        # First: the base asks for the weight.
        self.parameter_name = parameter_name
        super().__init__(base_layer, state)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        shape = tuple(self.get_param().shape)
        self.num_experts = shape[0] if len(shape) == 3 else 1
        self._experts_dim = len(shape) == 3
        self._in_by_out = len(shape) == 3 and bool(
            getattr(self.get_base_layer(), "is_transposed", False)
        )
        p, q = shape[-2:]
        self.in_features, self.out_features = (p, q) if self._in_by_out else (q, p)

    @classmethod
    def around(cls, layer: nn.Module, state: AdapterState, parameter_name: str) -> ParamWrapper:
        """A wrapper in a model."""
        return cls(layer, state, parameter_name)

    def get_base_layer(self) -> nn.Module:
        """The module itself, inside all wrappers."""
        inner = self.base_layer
        return inner.get_base_layer() if isinstance(inner, ParamWrapper) else inner

    def get_param(self) -> torch.Tensor:
        """The parameter, without updates."""
        parameter: torch.Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return parameter

    @property
    def weight_view(self) -> ParameterWeight:
        return ParameterWeight(self.get_base_layer(), self.parameter_name)

    def add_factors(self, name: str, record: LayerAdapter, dtype: torch.dtype) -> None:
        ranks = record.r * self.num_experts
        meta: dict[str, Any] = {"bias": False, "device": "meta", "dtype": dtype}
        self.lora_A[name] = nn.Linear(self.in_features, ranks, **meta)
        self.lora_B[name] = nn.Linear(ranks, self.out_features, **meta)

    def per_expert(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A as (experts, r, in) and B as (experts, out, r)."""
        a, b = self.factors(adapter)
        per_A = a.unflatten(0, (self.num_experts, -1))
        per_B = b.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)
        return per_A, per_B

    def sides(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., p, r) and (..., r, q), whose product is shaped like the parameter."""
        a, b = self.per_expert(adapter)
        left, right = (a.mT, b.mT) if self._in_by_out else (b, a)
        return (left, right) if self._experts_dim else (left[0], right[0])

    def update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """There is no such input: the module decides what each expert is multiplied by."""
        raise NotImplementedError

    def delta_weight(self, adapter: str) -> torch.Tensor:
        left, right = self.sides(adapter)
        dtype, scaling = accumulation_dtype(left.dtype), self.records[adapter].scaling
        if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
            return (left.to(dtype) @ right.to(dtype)) * scaling
        delta = left.new_empty((*left.shape[:-1], right.shape[-1]), dtype=dtype)
        # One expert after another: a part of them has the bits of the whole, and no copy is large.
        for part, l_PR, r_RQ in zip(*map(_as_stack, (delta, left, right)), strict=True):
            torch.mul(_packed(l_PR, dtype) @ _packed(r_RQ, dtype), scaling, out=part)
        return delta

    def why_not_foldable(self, names: Sequence[str]) -> str | None:
        reasons = (self.records[n].variant.why_not_foldable(self, n) for n in names)
        return next(filter(None, reasons), self.weight_view.why_not_writable)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with the sum in the parameter's place."""
        refuse_rows(self, routing_of(self, kwargs))
        names = self.contributing()
        if not names:
            return self.base_layer(*args, **kwargs)
        with self._summed(names):
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _summed(self, names: Sequence[str]) -> Iterator[None]:
        module, name = self.get_base_layer(), self.parameter_name
        if self.weight_view.is_parametrized:
            with _appended(module, name, _Added(self, names)):
                yield
            return
        total = self.total(self.get_param(), names)
        how = getattr(getattr(module, "config", None), "_experts_implementation", None)
        with in_place_of(module, name, total if how in _FOLLOWED else total.dense()):
            yield

    def total(self, weight: torch.Tensor, names: Sequence[str]) -> LowRankSum:
        """`weight` with the updates of these adapters."""
        terms = [
            Term(*self.sides(name), self.records[name].scaling, self.lora_dropout[name])
            for name in names
        ]
        return LowRankSum(weight, terms)

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"


def _as_stack(matrices: torch.Tensor) -> torch.Tensor:
    return matrices if matrices.dim() == 3 else matrices[None]


def _packed(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return matrix.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


class _Added(nn.Module):
    """A last parametrization: adds updates to the values that the others computed."""

    def __init__(self, wrapper: ParamWrapper, names: Sequence[str]) -> None:
        super().__init__()
        # Not as a child: it lies inside of the wrapper.
        self.__dict__["_total"] = lambda weight: wrapper.total(weight, names).dense()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.__dict__["_total"](weight)
        return total


@contextmanager
def _appended(module: Any, name: str, last: nn.Module) -> Iterator[None]:
    steps = module.parametrizations[name]
    steps.append(last)
    try:
        with nn.utils.parametrize.cached():
            yield
    finally:
        del steps[len(steps) - 1]


def wrappers(layer: nn.Module) -> Iterator[ParamWrapper]:
    """The wrappers of a module's parameters, outermost first."""
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


def wrapped(
    layer: nn.Module,
    parameter_name: str,
    state: AdapterState,
    kind: type[ParamWrapper] = ParamWrapper,
) -> tuple[nn.Module, ParamWrapper]:
    """(outermost wrapper, the one of this parameter), which is made if it isn't there.

    Args:
        layer: the module, or the outermost of its wrappers.
        parameter_name: the parameter's name in the module.
        state: the model's shared state.
        kind: the class of a wrapper that is made.
    """
    here = list(wrappers(layer))
    for wrapper in here:
        if wrapper.parameter_name == parameter_name:
            return layer, wrapper
    module = here[-1].base_layer if here else layer
    order = _order(module)
    outer = [w for w in here if order.index(w.parameter_name) > order.index(parameter_name)]
    if not outer:
        made = kind.around(layer, state, parameter_name)
        return made, made
    made = kind.around(outer[-1].base_layer, state, parameter_name)
    outer[-1].base_layer = made
    return layer, made


def _order(module: nn.Module) -> list[str]:
    parametrized = module._modules.get("parametrizations")
    more = () if parametrized is None else tuple(parametrized._modules)
    return [*module._parameters, *more]
