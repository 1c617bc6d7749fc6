"""An adapter out of a model that was trained whole: the best low-rank part of what changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lamina.checkpoint.adapter import write_adapter
from lamina.checkpoint.origin import A_LEAVES, B_LEAVES, PREFIX
from lamina.checkpoint.structure import empty_model
from lamina.checkpoint.weights import WeightsOnDisk
from lamina.config import ALL_LINEAR, LoraConfig
from lamina.engine.combine import truncate_dense
from lamina.engine.flat_config import flat_config
from lamina.engine.layers.linear import is_conv1d
from lamina.engine.names import places
from lamina.engine.targets import LayerPlan, make_plan
from lamina.errors import ConversionError
from lamina.model.adapted import refuse_adapted
from lamina.model.combining import LayerReport
from lamina.storage.atomic import atomic_directory

Weights = Mapping[str, torch.Tensor]
ModelOrDirectory = nn.Module | str | Path


@dataclass(frozen=True)
class ExtractedAdapter:
    """An adapter that was taken out of a tuned model.

    Attributes:
        config: its config.
        tensors: its tensors by their names on disk.
        layers: plain module name -> its rank, and how far it is from what changed there.
        relative_error: `‖adapter − (tuned − base)‖_F / ‖tuned − base‖_F` over its layers.
        unchanged: targeted modules that are the same in both models.
        left_out: weights that differ and that the adapter says nothing about.
    """

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    layers: Mapping[str, LayerReport]
    relative_error: float
    unchanged: tuple[str, ...]
    left_out: tuple[str, ...]

    def save(self, directory: str | Path) -> None:
        """Write it as a plain adapter directory, whole or not at all."""
        with atomic_directory(directory) as staging:
            write_adapter(staging, self.config, self.tensors)


@torch.no_grad()
def extract_lora(
    tuned: ModelOrDirectory,
    base: ModelOrDirectory,
    *,
    rank: int | float = 16,
    target_modules: Collection[str] | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> ExtractedAdapter:
    """The adapter over `base` that comes closest to `tuned`, layer by layer, with the scaling 1.

    Of `tuned - base = U S V'` the leading singular triplets are kept, as `B = U sqrt(S)` and
    `A = sqrt(S) V'`. Directories are read tensor by tensor, and no model is built.

    Args:
        tuned: the model that was trained whole, or the directory that it was saved in.
        base: what it was before, likewise.
        rank: an int is the largest rank of a layer. A float in (0, 1] is the share of the squared
            singular values that each layer's smallest sufficient rank is to hold.
        target_modules: the layers, as in a `LoraConfig`; None takes every linear layer but the
            head. Layers that have not changed are left out.
        dtype: of the factors.

    Raises:
        ConversionError: the models don't fit together, or nothing targeted has changed.
        TargetError: `target_modules` match nothing.
    """
    _check_rank(rank)
    for model in (tuned, base):
        if isinstance(model, nn.Module):
            refuse_adapted(model)
    structure = base if isinstance(base, nn.Module) else empty_model(str(base))
    after, before = _weights(tuned), _weights(base)
    wanted = target_modules or ALL_LINEAR
    asked = LoraConfig(target_modules=wanted if isinstance(wanted, str) else set(wanted))
    plans = {layer.name: layer for layer in make_plan(structure, asked).layers}
    keys = _keys(plans, structure, after, before)
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, LayerReport] = {}
    squares = [0.0, 0.0]
    for name, key in keys.items():
        difference = after[key].float() - before[key].float()
        if not difference.any():
            continue
        norm = float(difference.norm())
        a, b, error = _factors(difference, structure.get_submodule(name), rank, dtype)
        place = int(plans[name].kind.kind == "embedding")
        tensors[f"{PREFIX}{name}.{A_LEAVES[place]}"] = a
        tensors[f"{PREFIX}{name}.{B_LEAVES[place]}"] = b
        layers[name] = LayerReport(a.shape[0], error / norm, error == 0)
        squares = [squares[0] + error**2, squares[1] + norm**2]
    if not layers:
        raise ConversionError(
            f"The models are the same in all {len(keys)} targeted layers: nothing to extract.",
            cure="give the tuned model first, and check target_modules",
        )
    return ExtractedAdapter(
        config=_config(structure, base, {name: each.rank for name, each in layers.items()}),
        tensors=tensors,
        layers=layers,
        relative_error=math.sqrt(squares[0] / squares[1]),
        unchanged=tuple(name for name in keys if name not in layers),
        left_out=_others(after, before, {keys[name] for name in layers}),
    )


def _check_rank(rank: int | float) -> None:
    share = isinstance(rank, float) and 0 < rank <= 1
    if not share and (isinstance(rank, (float, bool)) or rank < 1):
        raise ConversionError(
            f"rank={rank!r} is neither a positive integer nor a share above 0 and up to 1.",
            cure="pass rank=16, say, or rank=0.9",
        )


def _weights(model: ModelOrDirectory) -> Weights:
    return model.state_dict() if isinstance(model, nn.Module) else WeightsOnDisk(model)


def _keys(
    plans: Mapping[str, LayerPlan], structure: nn.Module, after: Weights, before: Weights
) -> dict[str, str]:
    """Plain module name -> the name of its weight, which has to be in both, in one shape."""
    found, faults = {}, []
    for name in plans:
        key = f"{name}.weight"
        lacking = [told for told, w in (("tuned", after), ("base", before)) if key not in w]
        if lacking:
            faults.append(f"{key} is not in the {' and the '.join(lacking)} model")
        elif after[key].shape != before[key].shape:
            shapes = [list(weights[key].shape) for weights in (after, before)]
            faults.append(f"{key} is {shapes[0]} in the tuned model, {shapes[1]} in the base")
        elif getattr(structure.get_submodule(name), "groups", 1) > 1:
            faults.append(f"{name} is a convolution with groups, which no adapter can match")
        found[name] = key
    if faults:
        raise ConversionError(
            f"The models don't fit together in {len(faults)} targeted layer(s).",
            faults=faults[:8],
            cure="give two models of one kind, or other target_modules",
        )
    return found


def _factors(
    difference: torch.Tensor, module: nn.Module, rank: int | float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B in the shapes of an adapter of `module`, and the norm of what they leave out."""
    in_by_out = isinstance(module, nn.Embedding) or is_conv1d(module)
    flat = (difference.T if in_by_out else difference).flatten(1)
    found = truncate_dense(flat, min(rank, *flat.shape) if isinstance(rank, int) else rank)
    # Shared between both: alike in size, they train alike and lose least in half precision.
    roots = found.B.norm(dim=0).sqrt()
    b = (found.B / roots.clamp(min=torch.finfo(roots.dtype).tiny)).to(dtype)
    a = (roots[:, None] * found.A).to(dtype)
    error = float((b.float() @ a.float() - flat).norm())
    if difference.dim() > 2:
        a = a.reshape(-1, *difference.shape[1:])
        b = b.reshape(*b.shape, *[1] * (difference.dim() - 2))
    return a.contiguous(), b.contiguous(), error


def _config(structure: nn.Module, base: ModelOrDirectory, ranks: dict[str, int]) -> LoraConfig:
    kind = type(structure).__name__
    known = getattr(base, "name_or_path", None) if isinstance(base, nn.Module) else str(base)
    modules = [place.original for place in places(structure) if place.name in ranks]
    plain = LoraConfig(
        base_model_name_or_path=known or None,
        task_type="CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None,
        auto_mapping={"base_model_class": kind, "parent_library": type(structure).__module__},
        fan_in_fan_out=all(is_conv1d(m) for m in modules if not isinstance(m, nn.Embedding)),
    )
    if plain.task_type is not None:
        plain.auto_mapping = None
    return flat_config(structure, plain, [plain], ranks, 1.0, [])


def _others(after: Weights, before: Weights, taken: Collection[str]) -> tuple[str, ...]:
    """Names of weights that differ, or that one of the models lacks, and that are not taken."""
    changed = []
    for key in sorted({*before, *after}):
        if key in taken:
            continue
        both = key in after and key in before
        if not both or not torch.equal(after[key], before[key]):
            changed.append(key)
    return tuple(changed)
