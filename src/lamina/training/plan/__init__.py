"""The plan: what it may say, how it is read, and everything that is wrong with it."""

from lamina.training.plan.adapters import adapter_config
from lamina.training.plan.editors import json_schema
from lamina.training.plan.reading import OpenedPlan, open_plan, read_plan
from lamina.training.plan.schema import Plan, StagePlan

__all__ = [
    "OpenedPlan",
    "Plan",
    "StagePlan",
    "adapter_config",
    "json_schema",
    "open_plan",
    "read_plan",
]
