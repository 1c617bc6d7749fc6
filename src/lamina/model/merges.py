"""What merging an adapter costs: the merged model's answers beside those of the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.checkpoint.probe import compare_logits, in_eval, values_of
from lamina.engine.dequantise import Source, merged_densely, quantised_places
from lamina.engine.fold import fold, unfold, unfolded
from lamina.engine.names import places
from lamina.engine.state import AdapterState
from lamina.engine.weights import weight_of
from lamina.errors import FoldError


@dataclass(frozen=True)
class MergeComparison:
    """How a merged model's answers differ from those of base and adapter.

    Attributes:
        target: "quantized", "dequantized", or "original" for the full-precision base.
        max_logit_difference: the largest difference between two logits.
        max_logit: the largest magnitude of a logit without merging, to compare with.
        kl: mean Kullback-Leibler divergence of the merged model's predictions from those without
            merging, over all positions, in nats.
        top1_agreement: the share of positions at which both predict the same token.
    """

    target: str
    max_logit_difference: float
    max_logit: float
    kl: float
    top1_agreement: float


@torch.no_grad()
def compare_merges(
    model: Any,
    inputs: Any,
    *,
    base: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> list[MergeComparison]:
    """Measure each way of merging the active adapters, and leave the model as it is.

    Args:
        model: an adapted model.
        inputs: what to ask it: keyword arguments in a mapping, or one positional argument.
        base: the same base in full precision, to measure the merge into that too.
        dtype: of layers that become dense; None takes that of the model's dense parameters.

    Returns:
        "quantized" (where the base is) and "dequantized", and with `base` "original".

    Raises:
        FoldError: an adapter can't be merged, or `base` is another model.
    """
    root, state = model.get_base_model(), model.adapter_state
    ways: dict[str, AbstractContextManager[None]] = {}
    if quantised_places(root):
        ways["quantized"] = _requantised(root, state)
    ways["dequantized"] = merged_densely(root, state, dtype=dtype)
    if base is not None:
        originals = _originals(root, base)
        ways["original"] = merged_densely(root, state, dtype=dtype, source=originals)
    with in_eval(model):
        with unfolded(root, state):
            before = _logits(model, inputs)
        found = []
        for target, way in ways.items():
            with way:
                found.append(_compare(target, before, _logits(model, inputs)))
    return found


@contextmanager
def _requantised(root: nn.Module, state: AdapterState) -> Iterator[None]:
    with unfolded(root, state):
        fold(root, state, requantise=True)
        try:
            yield
        finally:
            unfold(root)


def _originals(root: nn.Module, base: nn.Module) -> Source:
    """Dense values by place, from the same place of the full-precision base."""
    dense = {place.name: weight_of(place.original) for place in places(base)}
    wanted = quantised_places(root)
    faults = []
    for place in wanted:
        shape = tuple(weight_of(place.original).read().shape)
        view = dense.get(place.name)
        if view is None or view.why_not_readable or view.quantised:
            faults.append(f"{place.name}: there is no dense layer of this name")
        elif tuple(view.read().shape) != shape:
            faults.append(f"{place.name}: {tuple(view.read().shape)}, not {shape}")
    if faults:
        raise FoldError(
            "The base given is not this model's in full precision.",
            faults=faults[:8],
            cure="load it without quantization_config, from the same place",
        )
    return lambda place: dense[place.name].read()


def _logits(model: nn.Module, inputs: Any) -> torch.Tensor:
    given = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return values_of(given)[0].float()


def _compare(target: str, before: torch.Tensor, after: torch.Tensor) -> MergeComparison:
    found = compare_logits(before, after)
    return MergeComparison(
        target=target,
        max_logit_difference=found.max_difference,
        max_logit=float(before.abs().max()),
        kl=found.kl or 0.0,
        top1_agreement=found.top1 or 0.0,
    )
