"""`inject_adapter_in_model`, as peft has it."""

from __future__ import annotations

from typing import Any

from torch import nn

from lamina.interop.peft.placeholders import refuse_foreign
from lamina.interop.peft.registry import PEFT_TYPE_TO_TUNER_MAPPING


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Any] | None = None,
) -> nn.Module:
    """Add an adapter to a model in place, without a facade around it, and activate it.

    Args:
        peft_config: what it adapts and how.
        model: any module.
        adapter_name: its name.
        low_cpu_mem_usage: leave its weights on the meta device, to be loaded.
        state_dict: adapt the modules that these tensors are named after; values are not loaded.

    Raises:
        ValueError: the method can't be injected.
    """
    refuse_foreign(peft_config)
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ValueError("`create_and_replace` does not support prompt learning yet.")
    kind = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_config.peft_type)
    if kind is None:
        raise ValueError(
            f"`inject_adapter_in_model` does not support {peft_config.peft_type} yet. "
            "Please use `get_peft_model`."
        )
    tuner = kind(
        model,
        peft_config,
        adapter_name=adapter_name,
        low_cpu_mem_usage=low_cpu_mem_usage,
        state_dict=state_dict,
    )
    adapted: nn.Module = tuner.model
    return adapted
