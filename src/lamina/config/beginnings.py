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
# Each quantises and factorises every layer, also where a file is loaded.
_MOST_ITERATIONS = 100
_NAMES = {"eva": "EVA", "corda": "CorDA"}


def faults_of_beginnings(config: Any) -> list[str]:
    """Settings that an initialisation can't do without."""
    if _init(config) == "loftq" and not config.loftq_config:
        return ["`loftq_config` must be specified when `init_lora_weights` is 'loftq'."]
    iterations = config.loftq_config.get("loftq_iter") if _is_dict(config.loftq_config) else None
    if isinstance(iterations, int) and iterations > _MOST_ITERATIONS:
        return [f"loftq_config: loftq_iter={iterations!r}, more than {_MOST_ITERATIONS}"]
    return []


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


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


def _init(config: Any) -> str:
    return str(config.init_lora_weights).lower()


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)
