"""Where parameters are made and kept, by peft's functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

from lamina.engine.weights import weight_of

Function = TypeVar("Function", bound=Callable[..., Any])
_skipping: ContextVar[bool] = ContextVar("skipping", default=False)


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Let modules that are made inside have their parameters on the meta device."""
    register_parameter = nn.Module.register_parameter
    register_buffer = nn.Module.register_buffer

    def empty_parameter(module: Any, name: str, value: Any) -> None:
        register_parameter(module, name, value)
        if value is not None and not _skipping.get():
            kind, grad = type(value), value.requires_grad
            module._parameters[name] = kind(value.to("meta"), requires_grad=grad)

    def empty_buffer(module: Any, name: str, value: Any, persistent: bool = True) -> None:
        register_buffer(module, name, value, persistent=persistent)
        if value is not None:
            module._buffers[name] = value.to("meta")

    try:
        nn.Module.register_parameter = empty_parameter  # type: ignore[assignment, method-assign]
        if include_buffers:
            nn.Module.register_buffer = empty_buffer  # type: ignore[assignment, method-assign]
        with torch.device("meta") if include_buffers else nullcontext():
            yield
    finally:
        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
        nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]


def skip_init_on_device(func: Function) -> Function:
    """Let a function make real parameters, `init_empty_weights` notwithstanding."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        token = _skipping.set(True)
        try:
            return func(*args, **kwargs)
        finally:
            _skipping.reset(token)

    return wrapper  # type: ignore[return-value]


def check_deepspeed_zero3_enabled() -> bool:
    """Whether DeepSpeed spreads parameters over processes."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: Any = None) -> Any:
    """Have a parameter whole inside, where DeepSpeed spreads it."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank):
        yield


def dequantize_module_weight(module: nn.Module) -> torch.Tensor:
    """A layer's weight as a dense one."""
    return weight_of(module).read()


def get_bnb_param_type(param: Any) -> str | None:
    """The bits of bitsandbytes' parameters, "4bit" or "8bit"; None for others."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__)
