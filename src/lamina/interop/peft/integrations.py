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


def dequantize_bnb_weight(weight: nn.Parameter, state: Any = None) -> torch.Tensor:
    """A weight of bitsandbytes as a dense one.

    Args:
        weight: the parameter; `Int8Params` also need their layer's `state`.
        state: the layer's, with the scales of its rows.

    Raises:
        ValueError: there is no `state`, and the weight's scales lie there.
    """
    import bitsandbytes as bnb  # type: ignore[import-untyped, unused-ignore]

    packed: Any = weight
    if get_bnb_param_type(weight) == "4bit":
        dense: torch.Tensor = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        return dense
    if state is None:
        raise ValueError("An 8-bit weight of bitsandbytes can't be read without its `state`.")
    if state.SCB is None:
        state.SCB = packed.SCB
    scales = state.SCB.to(weight.device)
    rows: torch.Tensor = bnb.functional.int8_vectorwise_dequant(weight.data, scales)
    return rows


def get_layer_device_map(model: Any) -> dict[int, Any]:
    """Layer's number -> the device that it runs on; what is offloaded runs on the first other one.

    Raises:
        RuntimeError: a layer is on no device.
    """
    placed: dict[str, Any] = model.hf_device_map
    main = next(device for device in placed.values() if device not in ("cpu", "disk"))
    runs = {name: main if on in ("cpu", "disk") else on for name, on in placed.items()}
    count = model.config.num_hidden_layers
    if list(runs) == [""]:
        return dict.fromkeys(range(count), runs[""])
    found: dict[int, Any] = {}
    for index in range(count):
        on = [device for name, device in runs.items() if f".{index}." in f"{name}."]
        if not on:
            raise RuntimeError(f"layer {index} has not been mapped to a device.")
        found[index] = on[-1]
    return found


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Put the keys and values of a cache where their layers run, in place."""
    from transformers import Cache, EncoderDecoderCache

    if not isinstance(cache, Cache) or not hasattr(model, "hf_device_map"):
        return
    if isinstance(cache, EncoderDecoderCache):
        map_cache_to_layer_device_map(model, cache.self_attention_cache)
        return
    held: Any = cache
    for index, device in get_layer_device_map(model).items():
        layer = held.layers[index]
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
