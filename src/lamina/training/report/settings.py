"""How stages were set, what differs between them first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.training.plan.adapters import FIELDS
from lamina.training.plan.settings import Settings
from lamina.training.report.facts import StageFacts
from lamina.training.report.written import UNKNOWN

# Of the adapter: a stage that continues another's ranks has that one's.
_ADAPTER = frozenset(FIELDS)
# What isn't a trainer's setting, but changes what a stage becomes.
_BASE = ("dtype", "load_in_4bit", "load_in_8bit", "attn_implementation", "model_revision")
_NOT_SHOWN = {"datasets", "eval_datasets", "gate"}


@dataclass(frozen=True)
class Setting:
    """One setting over all stages.

    Attributes:
        name: of the setting.
        values: one per stage, as they are written.
        differs: whether they aren't all the same.
    """

    name: str
    values: tuple[str, ...]
    differs: bool


def settings_of(stages: Sequence[StageFacts]) -> tuple[Setting, ...]:
    """All that at least one stage has, in the order of a plan; those that differ first."""
    begun = [each for each in stages if each.inputs]
    order = ["mode", *(name for name in Settings.model_fields if name not in _NOT_SHOWN), *_BASE]
    found = []
    for name in order:
        values = [_value(each, begun, name) for each in begun]
        if any(value not in {None, False} for value in _plain(values)):
            written = tuple(map(written_as, values))
            found.append(Setting(name, written, len(set(written)) > 1))
    return tuple(sorted(found, key=lambda each: not each.differs))


def written_as(value: Any) -> str:
    """A value as a plan has it, on one line."""
    if value is None:
        return UNKNOWN
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _value(stage: StageFacts, stages: Iterable[StageFacts], name: str) -> Any:
    if name == "mode":
        return stage.mode
    if name in _ADAPTER and stage.mode == "continue":
        below = next((each for each in stages if each.name == stage.built_on), None)
        return None if below is None else _value(below, stages, name)
    return stage.inputs.get(name)


def _plain(values: Iterable[Any]) -> list[Any]:
    """Values that can be looked for in a set."""
    return [str(value) if isinstance(value, (dict, list)) else value for value in values]
