"""Bases beside their sketches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.checkpoint.record import Sketch
from lamina.checkpoint.sketch import Likeness, Over, compare
from lamina.checkpoint.sketch.memory import ModelWeights, sketch_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# What a merged LoRA of usual size adds to weights of usual size.
TINY = 1e-4


def told(recorded: nn.Module | Sketch, here: nn.Module, **over: Any) -> Likeness:
    """What `here` is, beside the recorded model."""
    sketch = recorded if isinstance(recorded, Sketch) else sketch_model(recorded)
    return compare(sketch, ModelWeights(here), Over(**over), name="someone/tiny")


def moved(model: nn.Module, size: float, *parts: str) -> nn.Module:
    """The model, with noise added to the weights whose names have one of these parts."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts or ("",)):
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.data += noise.to(parameter.dtype)
    return model
