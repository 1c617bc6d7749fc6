"""Training data: found, checked, and turned into what TRL's trainers take."""

from lamina.training.data.chat import read_template
from lamina.training.data.examples import Examples, read_examples
from lamina.training.data.prepare import SourceReport, StageData, prepare
from lamina.training.data.source import Source, open_data

__all__ = [
    "Examples",
    "Source",
    "SourceReport",
    "StageData",
    "open_data",
    "prepare",
    "read_examples",
    "read_template",
]
