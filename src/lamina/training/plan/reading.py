"""From a file to a plan, or to one error that lists all that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lamina.errors import PlanError
from lamina.training.plan import aliases, overrides
from lamina.training.plan.adapters import faults_of_adapters
from lamina.training.plan.document import Document, Fault, Where, read_document
from lamina.training.plan.messages import place_of, sentence
from lamina.training.plan.rules import faults_between
from lamina.training.plan.schema import Plan


@dataclass(frozen=True)
class OpenedPlan:
    """A plan, and the document that it was read from: the lines of its settings.

    Attributes:
        plan: what it says, checked.
        document: where it says so.
    """

    plan: Plan
    document: Document


def read_plan(path: str | Path, changes: Sequence[str] = ()) -> Plan:
    """Read and check a plan.

    Args:
        path: the file, YAML or JSON.
        changes: `KEY=VALUE` over what it says, see `lamina.training.plan.overrides`.

    Raises:
        PlanError: with every fault and its line, in their order.
    """
    return open_plan(path, changes).plan


def open_plan(path: str | Path, changes: Sequence[str] = ()) -> OpenedPlan:
    """Read and check a plan, and keep the lines of what it says; as `read_plan` otherwise."""
    return check_document(read_document(Path(path).expanduser()), changes)


def check_document(document: Document, changes: Sequence[str] = ()) -> OpenedPlan:
    """Check a plan that was parsed; it is changed in place, as `changes` and aliases ask for.

    Raises:
        PlanError: with every fault and its line, in their order.
    """
    found: list[Fault] = overrides.apply(document, changes)
    found += aliases.rename(document)
    plan, wrong = _validated(document)
    told = {where for where, _ in wrong}
    # A rule has nothing to say of what is no value at all.
    found += [*wrong, *(each for each in faults_between(document.values) if each[0] not in told)]
    if plan is not None:
        found += faults_of_adapters(plan)
    if plan is None or found or document.faults:
        raise plan_error(document, found)
    return OpenedPlan(plan, document)


def _validated(document: Document) -> tuple[Plan | None, list[Fault]]:
    if not isinstance(document.values, dict):
        kind = "empty" if document.values is None else f"a {type(document.values).__name__}"
        return None, [((), f"a plan is a mapping of names to values; this file is {kind}")]
    try:
        return Plan.model_validate(document.values), []
    except ValidationError as error:
        faults: dict[Where, str] = {}
        for each in error.errors():
            place = place_of(each["loc"], document.values)
            faults.setdefault(place.where, sentence(place, each, document.values))
        return None, list(faults.items())


def plan_error(document: Document, found: Sequence[Fault]) -> PlanError:
    """One error that tells all faults of a document, by their lines."""
    lines = fault_lines(document, found)
    count = f"{len(lines)} fault" + ("s" if len(lines) != 1 else "")
    return PlanError(
        f"{document.source} has {count}.",
        faults=lines,
        cure="mend these; lamina init writes a plan with every setting explained",
    )


def fault_lines(document: Document, found: Sequence[Fault]) -> list[str]:
    """`line 12: chat.lora_r: ...` for each fault, in the order of the lines."""
    told = [(line, f"line {line}: {what}") for line, what in document.faults]
    told += [_placed(document, where, what) for where, what in found]
    told.sort(key=lambda each: each[0])
    return list(dict.fromkeys(text for _, text in told))


def _placed(document: Document, where: Where, what: str) -> tuple[int, str]:
    name = ".".join(_named(document, where))
    if len(where) == 1 and where[0] in document.unread:
        return 0, f"command line: {where[0]} {what}"
    if any(where[:end] in document.overridden for end in range(1, len(where) + 1)):
        return 0, f"command line: {name}: {what}"
    if not document.lines:
        return 0, f"{name + ': ' if name else ''}{what}"
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
