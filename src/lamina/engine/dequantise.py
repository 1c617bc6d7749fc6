"""Make the quantised layers of a model dense: for good while merging, or for a while to measure."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lamina.engine.fold import fold, give_back, merge_and_unload, unfold, unfolded
from lamina.engine.layers import LoraLayer, ModulesToSaveWrapper
from lamina.engine.names import Place, places
from lamina.engine.state import AdapterState
from lamina.engine.weights import weight_of
from lamina.errors import FoldError

# Dense values for the layer at a place.
Source = Callable[[Place], torch.Tensor]


def quantised_places(model: nn.Module) -> list[Place]:
    """Where a model has quantised layers that can be read."""
    views = ((place, weight_of(place.original)) for place in places(model))
    return [place for place, view in views if view.quantised and view.why_not_readable is None]


def computing_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of most of a model's dense parameters, without the adapters'; None without any."""
    counts: Counter[torch.dtype] = Counter()
    for place in places(model):
        for parameter in place.original.parameters(recurse=False):
            if type(parameter) is nn.Parameter and parameter.dtype.is_floating_point:
                counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else None


def merge_dequantised(
    model: nn.Module,
    state: AdapterState,
    names: Iterable[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    safe: bool = False,
) -> nn.Module:
    """The plain model, all of its quantised layers dense, with adapters folded in.

    The dequantised values and the updates are summed in fp32 and rounded once, to `dtype`.

    Args:
        model: the adapted model.
        state: its shared state.
        names: the adapters; None means the active ones.
        dtype: of what was quantised; None takes that of the model's dense parameters.
        safe: look for NaN and Inf in all results before any weight is changed.

    Raises:
        FoldError: a layer can't be read, or a result is not finite; nothing was changed.
    """
    wanted = state.check_known(state.active if names is None else names)
    _check(model, wanted, safe=safe)
    unfold(model)
    give_back(model, [name for name in state.configs if name not in wanted])
    dtype = dtype or computing_dtype(model)
    done: dict[int, nn.Module] = {}
    for place, original in [(place, place.original) for place in quantised_places(model)]:
        layer = done.get(id(original))
        if layer is None:
            layer = done[id(original)] = dense_layer(original, _values, place, dtype)
            _put(place, layer)
            adapted = place.module
            records = adapted.records if isinstance(adapted, LoraLayer) else {}
            here = [name for name in wanted if name in records]
            if isinstance(adapted, LoraLayer) and here:
                adapted.fold(here, keep_unfolded=False)
            layer.to(dtype or weight_of(layer).dtype)
        _put(place, layer)
    return merge_and_unload(model, state, wanted, safe=False)


def dense_layer(
    original: nn.Module, source: Source, place: Place, dtype: torch.dtype | None
) -> nn.Module:
    """A dense layer in place of a quantised one, frozen, in a dtype that holds values and sum."""
    values = source(place)
    values = values.to(torch.promote_types(values.dtype, dtype or values.dtype), copy=True)
    if type(original).__module__.startswith("torch."):
        layer = copy.copy(original)
        # Parameters of a shallow copy are the original's own dict.
        layer._parameters = dict(original._parameters)
    else:
        n_out, n_in = values.shape
        layer = nn.Linear(n_in, n_out, bias=False, device="meta")
    bias: Any = getattr(original, "bias", None)
    layer.weight = nn.Parameter(values, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(values.dtype).clone(), requires_grad=False)
    return layer.train(original.training)


def _values(place: Place) -> torch.Tensor:
    return weight_of(place.original).read()


def _put(place: Place, layer: nn.Module) -> None:
    if isinstance(place.module, LoraLayer):
        place.module.base_layer = layer
    elif isinstance(place.module, ModulesToSaveWrapper):
        place.module.original_module = layer
    elif place.parent is not None:
        setattr(place.parent, place.child, layer)


def _check(model: nn.Module, wanted: Iterable[str], *, safe: bool) -> None:
    """Refuse before anything is changed."""
    faults = []
    for place in places(model):
        layer = place.module
        names = [n for n in wanted if isinstance(layer, LoraLayer) and n in layer.records]
        if not isinstance(layer, LoraLayer) or not names:
            continue
        view = layer.weight_view
        if view.quantised:
            reason = layer.why_not_summable(names) or view.why_not_readable
        else:
            reason = layer.why_not_foldable(names)
        missing = [name for name in names if name not in layer.merged_adapters]
        if reason is None and safe and not layer.is_finite(missing):
            reason = "NaN or Inf would come out"
        if reason:
            faults.append(f"{place.name}: {reason}")
    if faults:
        raise FoldError(
            f"{len(faults)} layers can't be merged into; nothing was changed.",
            faults=faults,
            cure="leave the adapter unfolded, or merge it into a dense base",
        )


@contextmanager
def merged_densely(
    model: nn.Module, state: AdapterState, *, dtype: torch.dtype | None, source: Source = _values
) -> Iterator[None]:
    """Inside, quantised layers are dense, and the active adapters merged into all layers.

    Args:
        model: the adapted model.
        state: its shared state.
        dtype: of the dense layers.
        source: dense values of the layer at a place; by default what is dequantised.
    """
    _check(model, state.active, safe=False)
    dtype = dtype or computing_dtype(model)
    with unfolded(model, state):
        swapped = []
        try:
            for place in quantised_places(model):
                original = place.original
                layer = dense_layer(original, source, place, dtype)
                swapped.append((place, original, layer))
                _put(place, layer)
            fold(model, state)
            for _, _, layer in swapped:
                layer.to(dtype or weight_of(layer).dtype)
            yield
        finally:
            unfold(model)
            for place, original, _ in swapped:
                _put(place, original)
