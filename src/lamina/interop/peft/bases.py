"""What the placeholders derive from, so that `isinstance` and `issubclass` answer as in peft."""

from __future__ import annotations

from lamina.interop.peft.config import PeftConfig, PromptLearningConfig
from lamina.interop.peft.tuner import BaseTuner, BaseTunerLayer

_LAYERS = ("Layer", "Linear", "Conv")
_PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning", "cpt", "cartridge")


def base_of(where: str, name: str) -> type:
    """The base of the class `name` in the module `where`."""
    if name.endswith("Config"):
        return PromptLearningConfig if any(part in where for part in _PROMPTS) else PeftConfig
    if name.endswith("Model"):
        return BaseTuner
    if ".tuners." in where and any(part in name for part in _LAYERS):
        return BaseTunerLayer
    return object
