"""Incremental PCA, by peft's name."""

from __future__ import annotations

from lamina.engine.preparing import IncrementalPCA

__all__ = ["IncrementalPCA"]
