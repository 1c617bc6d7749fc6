"""The page of the plan's keys, and its schema, are what the code says."""

from __future__ import annotations

from lamina.training.plan import Plan, StagePlan
from lamina.training.plan.explained import described
from lamina.training.plan.schema import Eval
from lamina.training.plan.settings import Data, Gate, Settings
from scripts.plan_table import SCHEMA, TABLE, page, schema


def test_page_and_schema_are_up_to_date() -> None:
    assert TABLE.read_text(encoding="utf-8") == page(), "run: python scripts/plan_table.py"
    assert SCHEMA.read_text(encoding="utf-8") == schema(), "run: python scripts/plan_table.py"


def test_every_key_is_described() -> None:
    for part in (Plan, StagePlan, Settings, Data, Eval, Gate):
        assert described(part).keys() == part.model_fields.keys(), part
