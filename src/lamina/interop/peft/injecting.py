"""`inject_adapter_in_model`, as peft has it."""

from __future__ import annotations

from lamina.model import inject_adapter_in_model

__all__ = ["inject_adapter_in_model"]
