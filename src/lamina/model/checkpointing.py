"""Activation checkpointing over a frozen embedding: without help, no gradient comes through."""

from __future__ import annotations

from typing import Any


def is_checkpointing(model: Any) -> bool:
    """Whether a transformers model recomputes activations now."""
    # The older name warns in newer releases, so the newer one is asked first.
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return False


def enable_checkpointing(model: Any, *args: Any, **kwargs: Any) -> None:
    """Let a transformers model recompute activations, whichever name its release has for it."""
    new = hasattr(model, "activation_checkpointing_enable")
    old_word, word = ("gradient", "activation") if new else ("activation", "gradient")
    given = f"{old_word}_checkpointing_kwargs"
    if given in kwargs:
        kwargs[f"{word}_checkpointing_kwargs"] = kwargs.pop(given)
    getattr(model, f"{word}_checkpointing_enable")(*args, **kwargs)
    hook_inputs(model)


def hook_inputs(model: Any) -> None:
    """Let the input embedding's output ask for gradients, as the re-entrant kind needs.

    Done once per model; a model that doesn't know how is left alone.
    """
    if getattr(model, "_lamina_inputs_hooked", False):
        return
    enable = getattr(model, "enable_input_require_grads", None)
    if callable(enable):
        enable()
        model._lamina_inputs_hooked = True
