"""Whether a plan can be run: dry runs of all that it asks for, before anything is trained."""

from lamina.training.preflight.check import check_plan
from lamina.training.preflight.report import DataReport, Need, PlanReport, StageReport

__all__ = ["DataReport", "Need", "PlanReport", "StageReport", "check_plan"]
