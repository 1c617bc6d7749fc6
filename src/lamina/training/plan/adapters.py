"""The LoraConfig that a stage of a plan asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lamina.config import LoraConfig
from lamina.errors import ConfigError
from lamina.training.plan.document import Fault
from lamina.training.plan.schema import Plan
from lamina.training.plan.settings import Settings

# A plan's setting -> the field of LoraConfig.
FIELDS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_exclude_modules": "exclude_modules",
    "lora_target_parameters": "target_parameters",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_bias": "lora_bias",
    "bias": "bias",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "init_lora_weights": "init_lora_weights",
}
_SETTINGS = {field: setting for setting, field in FIELDS.items()}
# Beginnings that look at data first, by calls that a plan has no words for.
_FROM_DATA = ("eva", "corda", "lora_ga", "loftq")
_NAMED = re.compile(r"(?:in )?(\w+)")


def adapter_config(settings: Settings) -> LoraConfig:
    """The config of the adapter that a stage trains.

    Args:
        settings: of the stage, as `Plan.settings_of` gives them.

    Raises:
        ConfigError: with everything that is wrong with them.
    """
    asked = {field: getattr(settings, name) for name, field in FIELDS.items()}
    given = {field: value for field, value in asked.items() if value is not None}
    task = "SEQ_CLS" if settings.method == "reward" else "CAUSAL_LM"
    return LoraConfig(task_type=task, **given)


def settings_of_ranks(plan: Plan, place: int) -> Settings:
    """What the ranks that a stage trains were begun with: its own, or those it continues."""
    while plan.stages[place].mode == "continue" and place > 0:
        place -= 1
    return plan.settings_of(plan.stages[place])


def faults_of_adapters(plan: Plan) -> Iterator[Fault]:
    """Settings of adapters that contradict one another."""
    for place, stage in enumerate(plan.stages):
        if stage.mode == "continue":
            continue
        settings = plan.settings_of(stage)
        begin = settings.init_lora_weights
        if str(begin).lower() in _FROM_DATA:
            told = f"{begin!r} begins by what it sees of data, which a run doesn't show it"
            yield ("stages", place, "init_lora_weights"), f"{told}; pissa, olora and others don't"
            continue
        try:
            adapter_config(settings)
        except ConfigError as error:
            for told in error.faults or (error.what,):
                yield (("stages", place, *setting_in(told)), told)


def setting_in(told: str) -> tuple[str, ...]:
    """The setting that a fault of a LoraConfig begins with, if it begins with one."""
    named = _NAMED.match(told)
    setting = _SETTINGS.get(named[1]) if named else None
    return (setting,) if setting else ()
