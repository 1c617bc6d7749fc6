"""peft's enumerations, errors and warning class."""

from __future__ import annotations

import enum

from lamina.config import TaskType
from lamina.errors import LaminaError

VERSION = "0.21.2"

__all__ = [
    "VERSION",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
]


_METHODS = """
PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA ADAMSS BOFT
ADAPTION_PROMPT IA3 BEFT LILY LOHA LOKR OFT POLY LN_TUNING VERA FROD PVERA FOURIERFT GLORA XLORA
HRA VBLORA UNILORA CPT MISS RANDLORA ROAD TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT OSF DELORA
GRALORA CARTRIDGE TINYLORA PSOFT PEANUT SHADOW SUPERTUNING DEFT
"""


class _Name(str, enum.Enum):
    """A string that is one of a few; equal to the string, and to Lamina's own member."""


PeftType = _Name("PeftType", [(name, name) for name in _METHODS.split()], module=__name__)


class PeftWarning(UserWarning):
    """The class of peft's own warnings."""


class PeftError(Exception):
    """The base of peft's own errors."""


class NoMatchingPeftModuleError(PeftError, LaminaError, ValueError):
    """An adapter matches no module or parameter of the model."""
