"""From a file to a plan, or to one error that lists all that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lamina.errors import PlanError, nearest
from lamina.training.plan import aliases, overrides
from lamina.training.plan.document import Document, Where, read_document
from lamina.training.plan.rules import faults_between
from lamina.training.plan.schema import Eval, Plan, StagePlan
from lamina.training.plan.settings import Data, Gate, Settings

Fault = tuple[Where, str]
_PARTS: dict[str, type[BaseModel]] = {
    "defaults": Settings,
    "stages": StagePlan,
    "evals": Eval,
    "datasets": Data,
    "eval_datasets": Data,
    "gate": Gate,
}


def read_plan(path: str | Path, changes: Sequence[str] = ()) -> Plan:
    """Read and check a plan.

    Args:
        path: the file, YAML or JSON.
        changes: `KEY=VALUE` over what it says, see `lamina.training.plan.overrides`.

    Raises:
        PlanError: with every fault and its line, in their order.
    """
    document = read_document(Path(path).expanduser())
    found: list[Fault] = overrides.apply(document, changes)
    found += aliases.rename(document)
    plan, wrong = _validated(document)
    told = {where for where, _ in wrong}
    # A rule has nothing to say of what is no value at all.
    found += [*wrong, *(each for each in faults_between(document.values) if each[0] not in told)]
    if plan is None or found or document.faults:
        raise _error(document, found)
    return plan


def _validated(document: Document) -> tuple[Plan | None, list[Fault]]:
    if not isinstance(document.values, dict):
        kind = "empty" if document.values is None else f"a {type(document.values).__name__}"
        return None, [((), f"a plan is a mapping of names to values; this file is {kind}")]
    try:
        return Plan.model_validate(document.values), []
    except ValidationError as error:
        faults: dict[Where, str] = {}
        for each in error.errors():
            where = _in_document(document, each["loc"])
            faults.setdefault(where, _told(where, each))
        return None, list(faults.items())


def _in_document(document: Document, loc: tuple[int | str, ...]) -> Where:
    """Where an error is, without the names of the alternatives that pydantic tried."""
    here: Any = document.values
    where: Where = ()
    for step in loc:
        in_list = isinstance(here, list) and isinstance(step, int) and step < len(here)
        if in_list or (isinstance(here, dict) and step in here):
            here = here[step]
        elif isinstance(here, (dict, list)) and step == loc[-1]:
            return (*where, step)
        else:
            # A single one where a list was meant.
            continue
        where = (*where, step)
    return where


def _told(where: Where, error: Any) -> str:
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return _unknown(where)
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        known = [
            each.strip(" '") for each in error["ctx"]["expected"].replace(" or ", ",").split(",")
        ]
        close = nearest(str(value), known)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{value!r} is none of {', '.join(known)}{hint}"
    shown = repr(value)
    told = error["msg"].removeprefix("Value error, ")
    return f"{told[:1].lower()}{told[1:]}, not {shown if len(shown) < 60 else shown[:57] + '...'}"


def _unknown(where: Where) -> str:
    name = str(where[-1])
    model = _model_at(where[:-1])
    known = set(model.model_fields)
    close = nearest(name, known)
    if model is Plan and name in Settings.model_fields:
        return "is a setting of stages: put it under defaults, or into a stage"
    return "is unknown" + (f"; did you mean {close[0]!r}?" if close else "")


def _model_at(where: Where) -> type[BaseModel]:
    names = [step for step in where if isinstance(step, str) and step in _PARTS]
    return _PARTS[names[-1]] if names else Plan


def _error(document: Document, found: Sequence[Fault]) -> PlanError:
    told = [(line, f"line {line}: {what}") for line, what in document.faults]
    told += [_placed(document, where, what) for where, what in found]
    told.sort(key=lambda each: each[0])
    lines = list(dict.fromkeys(text for _, text in told))
    count = f"{len(lines)} fault" + ("s" if len(lines) != 1 else "")
    return PlanError(
        f"{document.source} has {count}.",
        faults=lines,
        cure="mend these; lamina init writes a plan with every setting explained",
    )


def _placed(document: Document, where: Where, what: str) -> tuple[int, str]:
    name = ".".join(_named(document, where))
    if len(where) == 1 and where[0] in document.unread:
        return 0, f"command line: {where[0]} {what}"
    if any(where[:end] in document.overridden for end in range(1, len(where) + 1)):
        return 0, f"command line: {name}: {what}"
    line = document.line_of(where) or 1
    return line, f"line {line}: {name + ': ' if name else ''}{what}"


def _named(document: Document, where: Where) -> Iterator[str]:
    """The steps of a path, stages by their names."""
    here: Any = document.values
    for step in where:
        try:
            here = here[step]
        except (LookupError, TypeError):
            here = None
        own = here.get("name") if isinstance(step, int) and isinstance(here, dict) else None
        yield own if isinstance(own, str) else str(step + 1 if isinstance(step, int) else step)
