"""Chooses the implementation of an operation; every choice gives what `reference` gives."""

from __future__ import annotations

from lamina.engine.ops.reference import lora_linear, lora_linear_delta, rows_at_a_time

__all__ = ["lora_linear", "lora_linear_delta", "rows_at_a_time"]
