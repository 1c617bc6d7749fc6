"""How a config's `init_lora_weights` and the settings of initialisations go together."""

from __future__ import annotations

import warnings
from typing import Any

from lamina.config import methods

# init_lora_weights -> (the field of its settings, their class), where there is a default.
_SETTINGS: dict[str, tuple[str, type[methods.MethodConfig]]] = {
    "eva": ("eva_config", methods.EvaConfig),
    "corda": ("corda_config", methods.CordaConfig),
}
_NAMES = {"eva": "EVA", "corda": "CorDA"}
_CHANGING = ("olora", "corda", "lora_ga")


def faults_of_beginnings(config: Any) -> list[str]:
    """Settings that an initialisation can't do without."""
    if _init(config) == "loftq" and not config.loftq_config:
        return ["`loftq_config` must be specified when `init_lora_weights` is 'loftq'."]
    return []


def settle_beginnings(config: Any) -> None:
    """Fill in default settings, and warn of those that no initialisation will look at."""
    init = _init(config)
    if init != "loftq" and config.loftq_config:
        config.loftq_config = {}
        _warn(
            "`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'."
        )
    for name, (field, kind) in _SETTINGS.items():
        if init == name and getattr(config, field) is None:
            setattr(config, field, kind())
            _warn(
                f"`init_lora_weights` is '{name}' but `{field}` is not specified. Using default "
                f"{_NAMES[name]} config."
            )
        elif init != name and getattr(config, field) is not None:
            _warn(
                f"`{field}` specified but will be ignored when `init_lora_weights` is not '{name}'."
            )
    patterns = config.rank_pattern or config.alpha_pattern
    if config.use_rslora and patterns and (init in _CHANGING or init.startswith("pissa")):
        _warn(
            "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training "
            "conversion of what PiSSA, CorDA, OLoRA and LoRA-GA change in the base: peft can't "
            "do it, since its files don't say the scaling "
            "(`path_initial_model_for_weight_conversion`)."
        )


def _init(config: Any) -> str:
    return str(config.init_lora_weights).lower()


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)
