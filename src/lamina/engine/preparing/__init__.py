"""Passes over data that some initialisations need: before a model is adapted, or after.

A pass takes a function that runs the model, or an iterable of batches; where these come from is
none of its business.
"""

from __future__ import annotations

from lamina.engine.preparing.corda import preprocess_corda
from lamina.engine.preparing.eva import get_eva_state_dict, initialize_lora_eva_weights
from lamina.engine.preparing.loraga import preprocess_loraga
from lamina.engine.preparing.pca import IncrementalPCA

__all__ = [
    "IncrementalPCA",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
]
