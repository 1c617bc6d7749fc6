"""peft's helpers for scripts: signatures, scalings, casts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from lamina.engine.layers import LoraLayer
from lamina.engine.variants.dora_norm import DoraCaching
from lamina.interop.peft.config import PeftConfig
from lamina.interop.peft.kappa import KappaTuneSelector, find_kappa_target_modules
from lamina.model.penalties import MontecloraTrainerMixin

__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "MontecloraTrainerMixin",
    "find_kappa_target_modules",
]

_OPEN = ({"args", "kwargs"}, {"kwargs"})


def update_forward_signature(model: Any) -> None:
    """Show the base model's signature on `forward`, where the model's own says nothing."""
    _show(model, "forward", _OPEN[:1])


def update_generate_signature(model: Any) -> None:
    """Show the base model's signature on `generate`, where the model's own says nothing."""
    if hasattr(model, "generate"):
        _show(model, "generate", _OPEN)


def update_signature(model: Any, method: str = "all") -> None:
    """Show the base model's signature on "forward", "generate" or "all".

    Raises:
        ValueError: it is none of these.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(
            f"method {method} is not supported please choose one of ['forward', 'generate', 'all']"
        )
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _show(model: Any, name: str, unspoken: tuple[set[str], ...]) -> None:
    own = getattr(model, name)
    said = inspect.signature(own).parameters
    # Lamina's own says `*args`, the usual names and `**kwargs`.
    if set(said) not in unspoken and "args" not in said:
        return
    code = own.__func__
    copy = FunctionType(code.__code__, code.__globals__, name, code.__defaults__, code.__closure__)
    copy.__kwdefaults__ = code.__kwdefaults__
    shown = ("__doc__", "__name__", "__annotations__")
    functools.update_wrapper(copy, getattr(type(model.get_base_model()), name), assigned=shown)
    setattr(model, name, MethodType(copy, model))


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether an adapter's config lies there."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:
        # Whatever the hub raises means that there is none.
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply all scalings inside; they are restored afterwards.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: the model has no LoRA layers.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [(layer, layer.records) for layer in layers]
    try:
        # Other records, so that scalings that were read before keep their values.
        for layer, records in before:
            layer.records = {
                name: replace(record, scaling=record.scaling * multiplier)
                for name, record in records.items()
            }
        yield
    finally:
        for layer, records in before:
            layer.records = records


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Let adapters take inputs in the dtype in which they come."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [(layer, layer.cast_input_dtype_enabled) for layer in layers] if active else []
    try:
        for layer, _ in before:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, value in before:
            layer.cast_input_dtype_enabled = value
