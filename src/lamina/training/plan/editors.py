"""The JSON schema of a plan, by which editors complete and check it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from lamina.training.plan.explained import described
from lamina.training.plan.schema import Eval, Plan, Prompt, StagePlan
from lamina.training.plan.settings import Data, Gate, Settings

SCHEMA_NAME = "plan.schema.json"
_PARTS: tuple[type[BaseModel], ...] = (Plan, StagePlan, Settings, Data, Eval, Prompt, Gate)


def json_schema() -> dict[str, Any]:
    """The schema, with a description of every setting made from the docstrings."""
    made = Plan.model_json_schema()
    kinds = {"Plan": made, **made["$defs"]}
    for part in _PARTS:
        texts = described(part)
        schema = kinds[part.__name__]
        schema["description"] = (part.__doc__ or "").partition("\n")[0]
        for name, field in schema["properties"].items():
            field.pop("title", None)
            field["description"] = texts[name]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "lamina-plan-1",
        **made,
        "title": "Lamina: a plan of stages",
    }
