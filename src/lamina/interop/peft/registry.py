"""The tables from a method's name to its classes."""

from __future__ import annotations

from typing import Any

from lamina.interop.peft.config import LoraConfig
from lamina.interop.peft.types import PeftType
from lamina.model import LoraModel

PEFT_TYPE_TO_TUNER_MAPPING: dict[Any, Any] = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[Any, Any] = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[Any, str] = {PeftType.LORA: "lora_"}
PEFT_TYPE_TO_CONFIG_MAPPING: dict[Any, Any] = {PeftType.LORA: LoraConfig}


def get_peft_config(config_dict: dict[str, Any]) -> Any:
    """The config that a dict with `peft_type` describes."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)
