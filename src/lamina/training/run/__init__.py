"""Run a plan: stage after stage, kept where nothing changed, gone on with where it was cut off."""

from lamina.training.run.running import RunResult, run_plan
from lamina.training.run.told import StageResult, Told

__all__ = ["RunResult", "StageResult", "Told", "run_plan"]
