"""The plan: what it may say, how it is read, and everything that is wrong with it."""

from lamina.training.plan.reading import read_plan
from lamina.training.plan.schema import Plan, StagePlan, json_schema

__all__ = ["Plan", "StagePlan", "json_schema", "read_plan"]
