"""Updates that are no sum of ranks, as they act on a base, by the ranks that come closest."""

from __future__ import annotations

import math

import torch
from torch import nn

from lamina.checkpoint.adapter import AdapterFile
from lamina.engine.combine import Compressed, truncate_dense
from lamina.engine.compose import Factors
from lamina.engine.factored import factored_layers
from lamina.engine.layers import LoraLayer
from lamina.errors import StageError
from lamina.model.combining import dense_update
from lamina.stages.laid_over import adapted


@torch.no_grad()
def approximate_updates(
    base: nn.Module, file: AdapterFile, rank: int | None, energy: float | None
) -> dict[str, Compressed]:
    """Plain module name -> the best approximation of `W' - W`, with the scaling 1.

    Of DoRA that is `m * (W + s B A) / ‖W + s B A‖ - W`. One dense matrix is formed at a time; a
    large one is decomposed by a randomised range finder. The error is measured on the factors as
    they are stored.

    Args:
        base: the base; it is adapted for a while.
        file: the adapter.
        rank: the largest rank of a module; None doesn't limit it.
        energy: the share of the squared singular values to hold; None asks for `rank` alone.

    Raises:
        StageError: a layer's update can't be written as two factors.
    """
    with adapted(base, file) as (model, name):
        layers = [
            (module, layer)
            for module, layer in factored_layers(model.get_base_model())
            if name in layer.records
        ]
        grouped = [module for module, layer in layers if _groups(layer) > 1]
        if grouped:
            raise StageError(
                "Updates of convolutions with groups can't be approximated by two factors.",
                faults=grouped[:8],
                cure="use the adapter as it is, or fold it in: lamina merge DIR -o OUT",
            )
        return {module: _nearest(layer, name, rank, energy) for module, layer in layers}


def _groups(layer: LoraLayer) -> int:
    return int(getattr(layer.get_base_layer(), "groups", 1))


def _nearest(layer: LoraLayer, adapter: str, rank: int | None, energy: float | None) -> Compressed:
    update = dense_update(layer, adapter).double()
    side = min(update.shape)
    wanted = min(rank or side, side)
    found = truncate_dense(update, energy if energy is not None else wanted)
    kept = min(found.A.shape[0], wanted)
    root = torch.linalg.vector_norm(found.B[:, :kept], dim=0).sqrt()
    safe = torch.where(root > 0, root, torch.ones_like(root))
    a, b = (factor for factor in layer.factors(adapter))
    factors = Factors(
        A=(found.A[:kept] * root[:, None]).reshape(kept, *_columns(layer, update, a)).to(a.dtype),
        B=(found.B[:, :kept] / safe).reshape(update.shape[0], kept, *b.shape[2:]).to(b.dtype),
        scaling=1.0,
        bias=_bias(layer, adapter),
    )
    product = factors.B.double().flatten(1) @ factors.A.double().flatten(1)
    norm = float(update.norm())
    held = float(found.B[:, :kept].square().sum())
    return Compressed(
        factors=factors,
        error=float((product - update).norm()),
        norm=norm,
        energy=min(held / norm**2, 1.0) if norm and math.isfinite(norm) else 1.0,
    )


def _columns(layer: LoraLayer, update: torch.Tensor, a: torch.Tensor) -> tuple[int, ...]:
    """What A has beside ranks: features in, and of a convolution the kernel."""
    return tuple(a.shape[1:]) if layer.kind == "conv" else (update.shape[1],)


def _bias(layer: LoraLayer, adapter: str) -> torch.Tensor | None:
    bias = layer.tensors(adapter).get("lora_B.bias")
    return None if bias is None else bias.detach() * float(layer.records[adapter].scaling)
