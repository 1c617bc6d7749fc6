"""EVA's pass over data, by peft's names."""

from __future__ import annotations

from lamina.engine.preparing import get_eva_state_dict, initialize_lora_eva_weights
from lamina.engine.preparing.inputs import forward_fn_dict
from lamina.engine.preparing.inputs import (
    language_modeling_mask as prepare_model_inputs_fn_language_modeling,
)
from lamina.engine.preparing.inputs import (
    language_modeling_rows as prepare_layer_inputs_fn_language_modeling,
)

__all__ = [
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
]
