"""Run a plan: stage after stage, kept where nothing changed, gone on with where it was cut off.

What needs torch is imported when it is first used, so that a run can be looked at without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lamina.training.run.told import RunResult, StageResult, Told

if TYPE_CHECKING:
    from lamina.training.run.running import run_plan

__all__ = ["RunResult", "StageResult", "Told", "run_plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lamina.training.run' has no attribute {name!r}")
    return getattr(importlib.import_module("lamina.training.run.running"), name)
