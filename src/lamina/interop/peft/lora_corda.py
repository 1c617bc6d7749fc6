"""CorDA's pass over data, by peft's names."""

from __future__ import annotations

from lamina.engine.init.corda import CordaEigens
from lamina.engine.preparing import preprocess_corda

__all__ = ["CordaEigens", "preprocess_corda"]
