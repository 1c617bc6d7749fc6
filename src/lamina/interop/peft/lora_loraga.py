"""LoRA-GA's pass over data, by peft's names."""

from __future__ import annotations

from lamina.engine.preparing import preprocess_loraga

__all__ = ["preprocess_loraga"]
