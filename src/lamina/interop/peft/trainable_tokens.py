"""`peft.tuners.trainable_tokens`: the layer that LoRA's trainable tokens use."""

from __future__ import annotations

from lamina.engine.layers import TrainableTokensLayer

__all__ = ["TrainableTokensLayer"]
