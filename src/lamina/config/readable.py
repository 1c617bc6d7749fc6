"""What can be read of a config whose values nobody has checked."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

from lamina.config.adalora import AdaLoraConfig
from lamina.config.checks import faults_of_numbers, faults_of_patterns
from lamina.config.lora import LoraConfig
from lamina.config.types import fits


def readable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields whose values are of the types that they should be; unknown ones are left out."""
    hints = _hints(values.get("peft_type") == "ADALORA")
    return {
        name: value for name, value in values.items() if name in hints and fits(value, hints[name])
    }


def numbers_hold(values: Mapping[str, Any]) -> bool:
    """Whether ranks, alphas and their patterns are such that scalings follow from them."""
    adalora = values.get("peft_type") == "ADALORA"
    numbers = SimpleNamespace(
        r=values.get("init_r", AdaLoraConfig.init_r) if adalora else values.get("r", LoraConfig.r),
        lora_alpha=values.get("lora_alpha", LoraConfig.lora_alpha),
        lora_dropout=0.0,
        rank_pattern={} if adalora else values.get("rank_pattern"),
        alpha_pattern=values.get("alpha_pattern"),
    )
    if faults_of_numbers(numbers) or faults_of_patterns(numbers):
        return False
    return isinstance(values.get("use_rslora", False), bool)


@cache
def _hints(adalora: bool) -> dict[str, Any]:
    kind = AdaLoraConfig if adalora else LoraConfig
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
