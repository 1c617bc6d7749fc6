"""Where in the document a setting of a stage stands: in the stage, or in `defaults`."""

from __future__ import annotations

from typing import Any

from lamina.training.plan import Plan
from lamina.training.plan.document import Document, Where


def document_of(plan: Plan, source: str) -> Document:
    """The document of a plan that was made without a file: it has no lines."""
    return Document(source, plan.model_dump(exclude_none=True))


def place_of(document: Document, stage: int, *steps: str | int) -> Where:
    """The place of a stage's setting, or of what gives it.

    Args:
        document: the plan's.
        stage: its number, from 0.
        steps: the setting, and further into it.
    """
    own: Where = ("stages", stage, *steps)
    shared: Where = ("defaults", *steps)
    if not steps or _at(document.values, own[:3]) is not None:
        return own
    return shared if _at(document.values, shared[:2]) is not None else own


def place_in(document: Document, where: Where, word: str) -> Where:
    """Go one step further to the item or key of a list or mapping that is called `word`."""
    found = _at(document.values, where)
    if isinstance(found, list) and word in found:
        return (*where, found.index(word))
    return (*where, word) if isinstance(found, dict) and word in found else where


def _at(values: Any, where: Where) -> Any:
    for step in where:
        try:
            values = values[step]
        except (LookupError, TypeError):
            return None
    return values
