"""Prepare a quantised model for training: freeze it, upcast what is not quantised."""

from __future__ import annotations

from typing import Any

import torch

from lamina.model.checkpointing import enable_checkpointing

_QUANTISED_OTHERWISE = ("gptq", "aqlm", "eetq", "torchao", "hqq")


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a model, bring its half-precision parameters to fp32, let it recompute activations.

    Args:
        model: a transformers model, usually loaded in 4 or 8 bits; it is changed in place.
        use_gradient_checkpointing: recompute activations, if the model is quantised.
        gradient_checkpointing_kwargs: how, e.g. `{"use_reentrant": False}`.
        auto_clear_cache: give the memory of the old parameters back to the device.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    method = getattr(model, "quantization_method", None)
    otherwise = method in _QUANTISED_OTHERWISE or getattr(model, "hqq_quantized", False)
    if not otherwise:
        _upcast(model)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    in_kbit = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if (in_kbit or otherwise) and use_gradient_checkpointing:
        _checkpoint(model, gradient_checkpointing_kwargs or {})
    return model


def _upcast(model: Any) -> None:
    for parameter in model.parameters():
        half = parameter.dtype in (torch.float16, torch.bfloat16)
        # Its packed storage may look like half precision.
        if half and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    if options.get("use_reentrant", True):
        enable_checkpointing(model, gradient_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
