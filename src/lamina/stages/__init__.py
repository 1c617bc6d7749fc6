"""Stages: begin one on top of another, save it as one laminated adapter, load and list chains."""

from lamina.stages.begin import begin_stage
from lamina.stages.lineage import lineage
from lamina.stages.load import load
from lamina.stages.save import save_stage

__all__ = ["begin_stage", "lineage", "load", "save_stage"]
