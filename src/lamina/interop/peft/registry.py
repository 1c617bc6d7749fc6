"""The tables from a method's name to its classes."""

from __future__ import annotations

import warnings
from typing import Any

from lamina.interop.peft.lora_config import LoraConfig
from lamina.interop.peft.methods import METHODS
from lamina.interop.peft.modules import resolve
from lamina.interop.peft.tuner import LoraModel
from lamina.interop.peft.types import PeftType

PEFT_TYPE_TO_TUNER_MAPPING: dict[Any, Any] = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[Any, Any] = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[Any, str] = {
    PeftType.LORA: "lora_",
    PeftType.ADALORA: "lora_",
}
PEFT_TYPE_TO_CONFIG_MAPPING: dict[Any, Any] = {PeftType.LORA: LoraConfig}


def _fill() -> None:
    """List the methods that Lamina doesn't have, so that their names lead to a clear error."""
    for kind in PeftType:
        folder = kind.value.lower()
        if folder not in METHODS:
            continue
        home = f"peft.tuners.{folder}"
        for name in METHODS[folder].names.split():
            if name.endswith("Config"):
                PEFT_TYPE_TO_CONFIG_MAPPING[kind] = resolve(home, name)
            elif name.endswith(("Model", "Embedding", "Encoder")):
                PEFT_TYPE_TO_TUNER_MAPPING.setdefault(kind, resolve(home, name))
        PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(kind, f"{folder}_")


_fill()


def warn_of_prefix(config: Any, adapter_name: str) -> None:
    """Warn of an adapter's name that lies in the names of its parameters."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
    if prefix and adapter_name in prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading.",
            stacklevel=3,
        )


def get_peft_config(config_dict: dict[str, Any]) -> Any:
    """The config that a dict with `peft_type` describes."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)


def register_peft_method(
    *,
    name: str,
    config_cls: Any,
    model_cls: Any,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """Add a method to the tables.

    Raises:
        ValueError, KeyError: its name is no method's, or taken, or its prefixes contradict.
    """
    if name.endswith("_"):
        raise ValueError(f"Please pass the name of the PEFT method without '_' suffix, got {name}.")
    if not name.islower():
        raise ValueError(
            f"The name of the PEFT method should be in lower case letters, got {name}."
        )
    if name.upper() not in list(PeftType):
        raise ValueError(f"Unknown PEFT type {name.upper()}, please add an entry to PeftType.")
    kind = PeftType(name.upper())
    prefix = f"{name}_" if prefix is None else prefix
    if kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise KeyError(f"There is already PEFT method called '{name}', please choose another.")
    if prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise KeyError(f"There is already a prefix called '{prefix}', please choose another.")
    own = getattr(model_cls, "prefix", None)
    if own is not None and own != prefix:
        raise ValueError(f"Inconsistent prefixes found: '{prefix}' and '{own}'.")
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = prefix
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = model_cls
    if is_mixed_compatible:
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING[kind] = model_cls
