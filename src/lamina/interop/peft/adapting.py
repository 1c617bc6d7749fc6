"""`get_peft_model`, as peft has it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lamina.interop.peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from lamina.interop.peft.facade import PeftModel
from lamina.interop.peft.placeholders import refuse_foreign
from lamina.interop.peft.registry import warn_of_prefix
from lamina.interop.peft.tuner import BaseTunerLayer


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Adapt a model; what is doubtful warns, as it does in peft.

    Args:
        model: any module; it is adapted in place.
        peft_config: what to adapt and how. Unlike Lamina's own, it becomes the model's.
        adapter_name: the adapter's name.
        mixed: give a `PeftMixedModel`.
        autocast_adapter_dtype: keep adapters over half-precision weights in fp32.
        revision: of the base model, to be recorded.
        low_cpu_mem_usage: leave the adapter's weights on the meta device, to be loaded.
    """
    refuse_foreign(peft_config)
    _record_base(model, peft_config, revision)
    warn_of_prefix(peft_config, adapter_name)
    if getattr(peft_config, "init_lora_weights", None) == "eva" and not low_cpu_mem_usage:
        warnings.warn(
            "lora with eva initialization used with low_cpu_mem_usage=False. With "
            "low_cpu_mem_usage=True a larger batch may fit while its data is looked at.",
            stacklevel=2,
        )
    if mixed:
        from lamina.interop.peft.mixed import PeftMixedModel

        return PeftMixedModel(model, peft_config, adapter_name=adapter_name)
    facade = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    return facade(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def _record_base(model: nn.Module, config: Any, revision: str | None) -> None:
    """Write the base's name and revision into the config; warn where that changes something."""
    before = config.base_model_name_or_path
    now = model.__dict__.get("name_or_path") or None
    config.base_model_name_or_path = now
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload "
            "the model with a different config, make sure to call `.unload()` before.",
            stacklevel=3,
        )
    if before is not None and before != now:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{now}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=3,
        )
    if revision is None:
        return
    if config.revision is not None and config.revision != revision:
        warnings.warn(
            f"peft config has already set base model revision to {config.revision}, overwriting "
            f"with revision {revision}",
            stacklevel=3,
        )
    config.revision = revision
