"""Configurations of other tools, read into a plan; nothing of them is dropped in silence."""

from lamina.training.plan.importing.draft import Note
from lamina.training.plan.importing.imported import Imported, import_plan

__all__ = ["Imported", "Note", "import_plan"]
