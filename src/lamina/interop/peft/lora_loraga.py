"""LoRA-GA's pass over data, by peft's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lamina.engine.preparing import preprocess_loraga

__all__ = ["estimate_gradients", "preprocess_loraga"]


def estimate_gradients(
    model: nn.Module, lora_config: Any, train_step: Callable[[], object]
) -> None:
    """Leave on each targeted linear layer the gradient of its weight, and no file."""
    preprocess_loraga(model, lora_config, train_step)
