"""Stages: begin one on top of another, save it as one laminated adapter; load and verify it."""

from lamina.stages.begin import begin_stage
from lamina.stages.diff import diff
from lamina.stages.edit import drop_last_stage, rename_stage
from lamina.stages.export import check_export, export
from lamina.stages.flatten import flatten
from lamina.stages.lineage import lineage
from lamina.stages.load import load
from lamina.stages.save import save_stage
from lamina.stages.split import split
from lamina.stages.verify import VerifyReport, verify

__all__ = [
    "VerifyReport",
    "begin_stage",
    "check_export",
    "diff",
    "drop_last_stage",
    "export",
    "flatten",
    "lineage",
    "load",
    "rename_stage",
    "save_stage",
    "split",
    "verify",
]
