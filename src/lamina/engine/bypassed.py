"""Layers that fused kernels pass over: they read a layer's weight, and never call the layer."""

from __future__ import annotations

from torch import nn

from lamina.engine.names import unadapted

# The kernels of state-space models take these layers' weights; models by their `model_type`.
_STATE_SPACE = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
_READ = frozenset({"out_proj", "conv1d"})


def why_bypassed(model: nn.Module, name: str) -> str | None:
    """None if an adapter around the layer of that plain name is called, else the reason."""
    kind = getattr(getattr(unadapted(model), "config", None), "model_type", None)
    leaf = name.rpartition(".")[2]
    if kind not in _STATE_SPACE or leaf not in _READ:
        return None
    return (
        f"{leaf!r} is incompatible with Mamba-based models such as {kind}: their fused kernels "
        "read its weight and would pass the adapter over"
    )
