"""Adapters as dicts of tensors, as peft has them."""

from __future__ import annotations

from lamina.model import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = ["get_peft_model_state_dict", "set_peft_model_state_dict"]
