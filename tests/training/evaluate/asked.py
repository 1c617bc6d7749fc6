"""Evals of plans over data that is written in place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lamina.training.evaluate.measuring import measure
from lamina.training.evaluate.prepared import Prepared, prepare_evals
from lamina.training.evaluate.scores import Score
from lamina.training.plan import Plan
from tests.ecosystem import texts
from tests.training.data.written import jsonl

PT = {"name": "one", "method": "pt", "datasets": "a.jsonl"}


def plan(evals: dict[str, Any], *stages: dict[str, Any], **changes: Any) -> Plan:
    """A plan with these evals; its base is never loaded."""
    told = {"model_name_or_path": "base", "output_dir": "out", "evals": evals, **changes}
    return Plan.model_validate({**told, "stages": [*(stages or (PT,))]})


def prepared(
    folder: Path, rows: Iterable[Any], *stages: dict[str, Any], **settings: Any
) -> Prepared:
    """An eval of these rows."""
    jsonl(folder / "held.jsonl", rows)
    asked = plan({"held": {"datasets": "held.jsonl", **settings}}, *stages)
    return prepare_evals(asked, tokenizer=texts.tokenizer(), root=folder)["held"]


def score(held: Prepared, model: Any, **settings: Any) -> Score:
    """What a model comes to."""
    found = measure(held, model, texts.tokenizer(), **settings)
    assert found is not None
    return found
