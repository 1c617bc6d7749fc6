"""Merge adapters for good; over a quantised base in one of two ways, which the caller names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn

from lamina.engine.dequantise import merge_dequantised
from lamina.engine.fold import merge_and_unload
from lamina.engine.state import AdapterState
from lamina.errors import ConfigError

Target = Literal["quantized", "dequantized"]

# What transformers marks a quantised model by.
_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def merge(
    model: nn.Module,
    state: AdapterState,
    names: Iterable[str] | None = None,
    *,
    safe: bool = False,
    target: Target | None = None,
    dtype: torch.dtype | None = None,
    untie: bool = False,
) -> nn.Module:
    """The plain model with adapters (None: the active ones) folded in for good.

    Args:
        model: the adapted model.
        state: its shared state.
        names: the adapters.
        safe: look for NaN and Inf in all results before any weight is changed.
        target: what quantised layers become: "quantized" rounds the sums to their codes again,
            "dequantized" makes all of them dense. It makes no difference to a dense model.
        dtype: of the layers that become dense; None takes that of the model's dense parameters.
        untie: give modules that share a weight one each before.

    Raises:
        ConfigError: the settings contradict each other.
        FoldError: a layer can't be folded into, or is quantised and no target is given.
    """
    check_target(target, dtype)
    if untie and target == "dequantized":
        raise ConfigError(
            "untie=True doesn't go with target='dequantized'.",
            cure="untie the base's weights before it is adapted",
        )
    tied = _shares(model)
    if target is None:
        merged = merge_and_unload(model, state, names, safe=safe, untied=untie)
        return _tell_untied(merged) if tied else merged
    if target == "quantized":
        merged = merge_and_unload(model, state, names, safe=safe, requantise=True, untied=untie)
    else:
        merged = merge_dequantised(model, state, names, dtype=dtype, safe=safe)
        _unmark(merged)
    _forget_conversions(merged)
    return _tell_untied(merged) if tied else merged


def _shares(model: nn.Module) -> bool:
    """Whether the head has the embedding's weight."""
    try:
        tables = [getattr(model, f"get_{side}_embeddings")() for side in ("input", "output")]
    except (AttributeError, NotImplementedError):
        return False
    first, last = (
        getattr(getattr(t, "base_layer", t), "weight", None) for t in map(_whole, tables)
    )
    return first is not None and first is last


def _whole(table: Any) -> Any:
    return getattr(table, "original_module", table)


def _tell_untied(model: nn.Module) -> nn.Module:
    """Where one of two tied weights was trained whole, readers must not tie them again."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False) and not _shares(model):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return model


def check_target(
    target: str | None, dtype: torch.dtype | None = None, *, only: str | None = None
) -> None:
    """Refuse an unknown target, one that is not the only one possible, and a dtype for codes."""
    known = get_args(Target)
    if target is not None and target not in known:
        raise ConfigError(
            f"target={target!r} is unknown.", cure=f"target={known[0]!r} or target={known[1]!r}"
        )
    if target is not None and only is not None and target != only:
        raise ConfigError(
            f"target={target!r} can't be taken back.",
            cure=f"merge_and_unload(target={target!r}) does it for good",
        )
    if dtype is not None and target != "dequantized":
        raise ConfigError(
            f"dtype={dtype} is that of layers that become dense, and none do.",
            cure="target='dequantized' with it, or .to(dtype) afterwards",
        )


def _forget_conversions(model: Any) -> None:
    """Let transformers save the weights as they lie in the model.

    It would undo what a quantiser did on loading codes, and knows no way to.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [
            each for each in conversions if all(map(_is_general, getattr(each, "operations", ())))
        ]


def _is_general(operation: object) -> bool:
    return not type(operation).__module__.startswith("transformers.integrations")


def _unmark(model: Any) -> None:
    """Let transformers take the model for a dense one: to save, move and load it as such."""
    for mark in _MARKS:
        if mark in model.__dict__:
            delattr(model, mark)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
