"""A weight plus low-rank updates that is multiplied by without ever being written out.

While an adapted module runs, this stands where its parameter was. Products of activations with it
(or with one expert of it, or with its transpose) go through the factors; whatever else is done to
it sees the dense sum, which is then made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lamina.engine.dtypes import exact, to_adapter_input
from lamina.engine.layers import grouped
from lamina.errors import TargetError

_Options = Mapping[str, Any]


@dataclass(frozen=True)
class Term:
    """One update of a weight of shape (..., p, q): `scaling * left @ right`.

    Attributes:
        left: (..., p, r).
        right: (..., r, q).
        scaling: the number in front.
        dropout: drops entries of the activations that the factors take.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    dropout: nn.Module

    def transposed(self) -> Term:
        """The update of the transposed weight."""
        return replace(self, left=self.right.mT, right=self.left.mT)

    def at(self, index: Any) -> Term:
        """The update of some of the experts."""
        return replace(self, left=self.left[index], right=self.right[index])

    def after(self, x: torch.Tensor) -> torch.Tensor:
        """`scaling * dropout(x) @ left @ right`."""
        dropped = self.dropout(to_adapter_input(x, self.left.dtype))
        product: torch.Tensor = dropped @ self.left @ self.right
        return product * self.scaling

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """`scaling * left @ (right @ dropout(x))`."""
        dropped = self.dropout(to_adapter_input(x, self.right.dtype))
        product: torch.Tensor = self.left @ (self.right @ dropped)
        return product * self.scaling


class LowRankSum(torch.Tensor):
    """`W + sum_i scaling_i * left_i @ right_i`, shaped and typed like W.

    Args:
        base: W, of shape (p, q), or (experts, p, q).
        terms: the updates.
    """

    base: torch.Tensor
    terms: tuple[Term, ...]

    @staticmethod
    def __new__(cls, base: torch.Tensor, terms: Sequence[Term]) -> LowRankSum:
        # Without a storage of its own, nothing can take it for the bare W by mistake.
        made: LowRankSum = torch.Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
        )
        made.base, made.terms = base, tuple(terms)
        return made

    def dense(self) -> torch.Tensor:
        """The sum written out, in W's dtype.

        Raises:
            TargetError: inputs would have to be dropped, and there are none to drop.
        """
        if "_dense" not in self.__dict__:
            if any(term.dropout.training and _drops(term.dropout) for term in self.terms):
                raise TargetError(
                    "A parameter with lora_dropout is used for something other than a matrix "
                    "product here, so that there are no inputs to drop.",
                    cure="set lora_dropout=0 for adapters with these target_parameters",
                )
            with exact(self.base.device):
                deltas = [(term.left @ term.right) * term.scaling for term in self.terms]
                total = sum(deltas[1:], start=deltas[0])
                self._dense = self.base + total.to(self.base.dtype)
        dense: torch.Tensor = self._dense
        return dense

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        handler = _handler(func)
        result = NotImplemented if handler is None else handler(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
        return func(*tree_map(_dense, tuple(args)), **tree_map(_dense, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        raise TargetError(
            f"{func} takes an adapted parameter in a way that its update can't follow.",
            cure="target the module by target_modules, or leave this parameter out",
        )


@contextmanager
def in_place_of(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Let a module read `value` where it has a parameter or a child of that name.

    What lies in an instance's own dict is found before what is registered; nothing registered
    changes, so that names, optimizers and state dicts don't notice.
    """
    module.__dict__[name] = value
    try:
        yield
    finally:
        module.__dict__.pop(name, None)


def _drops(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.p > 0


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, LowRankSum) else value


def _base(value: Any) -> Any:
    return value.base if isinstance(value, LowRankSum) else value


# --- products ------------------------------------------------------------------------------------


def _added(out: torch.Tensor, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    total = out
    for delta in deltas:
        total = total + delta
    return total.to(out.dtype)


def _matmul(func: Any, a: Any, b: Any) -> Any:
    if isinstance(a, LowRankSum) == isinstance(b, LowRankSum):
        return NotImplemented
    out = func(_base(a), _base(b))
    if isinstance(b, LowRankSum):
        return _added(out, [term.after(a) for term in b.terms])
    return _added(out, [term.before(b) for term in a.terms])


def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, LowRankSum) or not isinstance(weight, LowRankSum) or weight.base.ndim != 2:
        return NotImplemented
    out = F.linear(input, weight.base, _dense(bias))
    return _added(out, [term.transposed().after(input) for term in weight.terms])


def _grouped_mm(func: Any, x: Any, weight: Any, offs: Any = None, **options: Any) -> Any:
    known = all(value is None for value in options.values()) and offs is not None
    if not known or isinstance(x, LowRankSum) or not isinstance(weight, LowRankSum):
        return NotImplemented
    out = func(x, weight.base, offs=offs)
    deltas = [
        grouped.product(func, term.dropout(x), term.left, term.right, offs) * term.scaling
        for term in weight.terms
    ]
    return _added(out, deltas)


# --- views ---------------------------------------------------------------------------------------


def _getitem(func: Any, weight: Any, index: Any) -> Any:
    if not isinstance(weight, LowRankSum) or weight.base.ndim < 3 or not _is_expert_index(index):
        return NotImplemented
    return LowRankSum(weight.base[index], [term.at(index) for term in weight.terms])


def _is_expert_index(index: Any) -> bool:
    if isinstance(index, torch.Tensor):
        integral = not (index.is_floating_point() or index.is_complex())
        return integral and index.dtype != torch.bool and index.ndim <= 1
    return isinstance(index, (int, slice)) and not isinstance(index, bool)


def _transposed(weight: LowRankSum) -> LowRankSum:
    return LowRankSum(weight.base.mT, [term.transposed() for term in weight.terms])


def _transpose(func: Any, weight: Any, dim0: int, dim1: int) -> Any:
    if not isinstance(weight, LowRankSum):
        return NotImplemented
    ndim = weight.base.ndim
    if {dim0 % ndim, dim1 % ndim} != {ndim - 2, ndim - 1}:
        return NotImplemented
    return _transposed(weight)


def _mT(func: Any, weight: Any, *rest: Any) -> Any:
    return _transposed(weight)


def _T(func: Any, weight: Any, *rest: Any) -> Any:
    return _transposed(weight) if weight.base.ndim == 2 else NotImplemented


def _split(func: Any, weight: Any, sizes: Any, dim: int = 0) -> Any:
    """Parts of a matrix, one below the other."""
    if not isinstance(weight, LowRankSum) or dim != 0 or weight.base.ndim != 2:
        return NotImplemented
    bases = func(weight.base, sizes)
    lefts = [func(term.left, sizes) for term in weight.terms]
    return tuple(
        LowRankSum(
            base,
            [replace(t, left=parts[i]) for t, parts in zip(weight.terms, lefts, strict=True)],
        )
        for i, base in enumerate(bases)
    )


def _attention(func: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's own attention, with the products in it taken as they are here."""
    return _unguarded_attention(*args, **kwargs)


# The function would hand anything but plain tensors back to where the call came from.
_unguarded_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
    F.multi_head_attention_forward.__closure__,
)


def _unbind(func: Any, weight: Any, dim: int = 0) -> Any:
    if not isinstance(weight, LowRankSum) or dim != 0 or weight.base.ndim < 3:
        return NotImplemented
    return tuple(weight[index] for index in range(weight.base.shape[0]))


def _like(func: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Another dtype, device or layout of W; the factors keep theirs."""
    if not isinstance(weight, LowRankSum):
        return NotImplemented
    base = func(weight.base, *args, **kwargs)
    same = base.shape == weight.base.shape and base.device == weight.base.device
    if not same or not base.is_floating_point():
        return NotImplemented
    return LowRankSum(base, weight.terms)


def _about_base(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*map(_base, args), **kwargs)


_T_ = torch.Tensor
_Handler = Callable[..., Any]
_HANDLERS: dict[Any, _Handler] = {
    **dict.fromkeys(
        [torch.matmul, torch.mm, torch.bmm, _T_.matmul, _T_.mm, _T_.bmm, _T_.__matmul__], _matmul
    ),
    F.linear: _linear,
    F.multi_head_attention_forward: _attention,
    **dict.fromkeys([torch.split, torch.chunk, _T_.split, _T_.chunk], _split),
    _T_.__getitem__: _getitem,
    **dict.fromkeys([torch.transpose, _T_.transpose], _transpose),
    **dict.fromkeys([torch.t, _T_.t], _T),
    **dict.fromkeys([torch.unbind, _T_.unbind], _unbind),
    **dict.fromkeys([_T_.to, _T_.contiguous, _T_.float, _T_.half, _T_.bfloat16], _like),
    **dict.fromkeys(
        [_T_.dim, _T_.size, _T_.numel, _T_.stride, _T_.data_ptr, _T_.element_size, _T_.__len__],
        _about_base,
    ),
    **dict.fromkeys([_T_.is_floating_point, _T_.is_complex, _T_.is_contiguous], _about_base),
}
_SAME_AS_BASE = (
    "shape dtype device ndim layout requires_grad is_cuda is_cpu is_meta is_sparse is_quantized "
    "is_nested itemsize nbytes"
)
_GETTERS: dict[str, _Handler] = {
    "T": _T,
    "mT": _mT,
    **dict.fromkeys(_SAME_AS_BASE.split(), _about_base),
}
# By name: torch.ops and private functions differ between releases.
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")


def _handler(func: Any) -> _Handler | None:
    found = _HANDLERS.get(func)
    if found is not None:
        return found
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return _GETTERS.get(getattr(func.__self__, "__name__", ""))
    return _grouped_mm if name in _GROUPED else None
