"""From the stages of several files to the values of one plan."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from lamina.training.plan.adapters import FIELDS
from lamina.training.plan.importing.draft import Draft
from lamina.training.plan.rules import ONLY
from lamina.training.plan.schema import NAME_PATTERN
from lamina.training.plan.writing import NAMES

_OWN = {"method", "datasets", "eval_datasets", "gate", "trainer_args", *ONLY}


def assemble(drafts: Sequence[Draft]) -> dict[str, Any]:
    """The values of a plan; what doesn't go together becomes a note of its draft."""
    ordered = _ordered(list(drafts))
    outputs = [_path(draft.output_dir) for draft in ordered if draft.output_dir]
    values: dict[str, Any] = {"model_name_or_path": None, "output_dir": _above(outputs)}
    names = _names(ordered)
    stages: list[dict[str, Any]] = []
    for place, draft in enumerate(ordered):
        _add_top(values, draft, outputs[:place])
        stage: dict[str, Any] = {"name": names[place]}
        settings = dict(draft.settings)
        if place:
            stage["mode"] = _mode(draft, ordered[:place])
            if stage["mode"] == "continue":
                _without_ranks(draft, settings, stages)
        elif draft.parent:
            draft.note(
                None,
                "parent",
                f"it begins on {draft.parent}, which none of these files makes",
                "import the file that made it too; the first stage of a plan has no parent",
            )
        stages.append({**stage, **settings})
    defaults = _shared(stages)
    for key in ("model_name_or_path", "output_dir"):
        if values[key] is None:
            del values[key]
    return {**values, **({"defaults": defaults} if defaults else {}), "stages": stages}


def _ordered(drafts: list[Draft]) -> list[Draft]:
    """Each after the one that makes its parent; else as they were given."""
    found: list[Draft] = []
    rest = list(drafts)
    while rest:
        waiting = [_path(other.output_dir) for other in rest if other.output_dir]
        ready = next((each for each in rest if not _made_by(each, waiting)), rest[0])
        found.append(ready)
        rest.remove(ready)
    return found


def _made_by(draft: Draft, outputs: Sequence[str]) -> bool:
    own = _path(draft.output_dir) if draft.output_dir else None
    return any(_within(draft.parent, each) for each in outputs if each != own)


def _path(text: str) -> str:
    return os.path.normpath(text)


def _within(parent: str | None, output: str) -> bool:
    return parent is not None and (_path(parent) + "/").startswith(output + "/")


def _above(outputs: Sequence[str]) -> str | None:
    """The folder that all outputs lie in."""
    if not outputs:
        return None
    common = os.path.commonpath(outputs) if len(set(map(os.path.isabs, outputs))) == 1 else ""
    return str(PurePosixPath(common).parent) if common in outputs else common or "runs"


def _names(drafts: Sequence[Draft]) -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for draft in drafts:
        method = str(draft.settings.get("method", "stage"))
        last = PurePosixPath(draft.output_dir or "").name
        name = last if re.match(NAME_PATTERN, last) else NAMES.get(method, method)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _add_top(values: dict[str, Any], draft: Draft, earlier: Sequence[str]) -> None:
    for key, value in draft.top.items():
        if values.get(key) is None:
            values[key] = value
        elif key == "model_name_or_path" and any(_within(str(value), each) for each in earlier):
            # The base with the stages before merged into it: in a plan the chain itself.
            draft.new_adapter, draft.follows = True, True
        elif values[key] != value:
            told = f"{value!r} here, and {values[key]!r} in another file"
            draft.note(None, key, told, "a plan has one for all stages; see which it is")


def _mode(draft: Draft, earlier: Sequence[Draft]) -> str:
    made = [_path(each.output_dir) for each in earlier if each.output_dir]
    linked = any(_within(draft.parent, each) for each in made)
    if draft.parent and not linked:
        told = f"it begins on {draft.parent}, which no stage before it makes"
        draft.note(None, "parent", told, "see whether the stage before it is the one that is meant")
    elif draft.parent and made and not _within(draft.parent, made[-1]):
        told = f"it begins on {draft.parent}, which isn't what the stage before it makes"
        draft.note(None, "parent", told, "make a plan for each branch")
    elif draft.parent and _path(draft.parent) not in made:
        told = f"it begins on a checkpoint ({draft.parent})"
        draft.note(None, "parent", told, "a stage begins on what the one before has saved")
    if draft.parent is None and not draft.follows:
        told = "it begins on the base itself there"
        cure = "in a plan it builds on the stage before: mode stack was put"
        draft.note(None, "parent", told, cure)
        return "stack"
    return "stack" if draft.new_adapter else "continue"


def _without_ranks(draft: Draft, settings: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    """A stage that continues has the ranks of the one that began them."""
    begun = next(each for each in reversed(stages) if each.get("mode") != "continue")
    for key in FIELDS:
        if key in settings:
            value = settings.pop(key)
            if begun.get(key) != value:
                told = f"{value!r} here, and {begun.get(key)!r} in the stage that it continues"
                draft.note(None, key, told, "the parent's ranks train on as they are; or stack")


def _shared(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Take out of the stages what all of them say; those that continue have no say on ranks."""
    shared: dict[str, Any] = {}
    if len(stages) < 2:
        return shared
    for key in [each for each in stages[0] if each not in _OWN and each not in ("name", "mode")]:
        said = [each for each in stages if key not in FIELDS or each.get("mode") != "continue"]
        if all(key in each and each[key] == stages[0][key] for each in said):
            shared[key] = stages[0][key]
            for each in stages:
                each.pop(key, None)
    return shared
