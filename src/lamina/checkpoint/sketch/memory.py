"""The weights of a model in memory, as they are without adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lamina.checkpoint.record import Sketch
from lamina.checkpoint.sketch.sampling import Tensor, sketch
from lamina.engine.layers import is_linear
from lamina.engine.layers.linear import linear_shape
from lamina.engine.names import places
from lamina.engine.weights import BaseWeight, DenseWeight, weight_of

if TYPE_CHECKING:
    from lamina.checkpoint.sketch.stored import Floats, Positions

_READABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def sketch_model(model: nn.Module) -> Sketch:
    """What a model's base weights look like, whether it is adapted by now or not.

    What is folded into the weights is part of them.
    """
    return sketch(ModelWeights(model))


class ModelWeights:
    """The weights of a model, sampled where they lie; the source is `sampling.Weights`.

    What is on the meta device, offloaded, or sharded over processes has a shape, and no values.

    Args:
        model: the model, adapted or not.
    """

    whole = True

    def __init__(self, model: nn.Module) -> None:
        self._holders: dict[str, nn.Parameter | BaseWeight] = {}
        self.aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, parameter, holder in _weights(model):
            known = first.setdefault(id(parameter), name)
            if known == name:
                self._holders[name] = holder
            else:
                self.aliases[name] = known

    def as_loaded(self) -> None:
        """They have the names of the model."""

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Plain name -> tensor; what is tied, once, under the first of its names."""
        return {name: _tensor(holder) for name, holder in self._holders.items()}

    @property
    def quantization(self) -> str | None:
        """What most quantised weights say of themselves."""
        views = [holder for holder in self._holders.values() if isinstance(holder, BaseWeight)]
        said = Counter(view.quantised for view in views if view.quantised is not None)
        return said.most_common(1)[0][0] if said else None

    @torch.no_grad()
    def read(self, wanted: Mapping[str, Positions]) -> dict[str, Floats]:
        """The values of these tensors at flat positions, as float32.

        NaN where a quantiser fails.
        """
        found = {}
        for name, positions in wanted.items():
            values = _values(self._holders[name])
            if values is None:
                found[name] = torch.full((len(positions),), torch.nan)
                continue
            # A view of what isn't contiguous can't be flattened without a copy of all of it.
            index = tuple(
                torch.from_numpy(each).to(values.device)
                for each in np.unravel_index(positions, tuple(values.shape) or (1,))
            )
            found[name] = (values if values.dim() else values[None])[index].float()
        return _on_cpu(found)


def _values(holder: nn.Parameter | BaseWeight) -> torch.Tensor | None:
    if not isinstance(holder, BaseWeight):
        return holder.detach()
    try:
        return holder.read()
    except Exception:
        # The kernel of a quantiser may be for another device; training doesn't need it.
        return None


def _on_cpu(found: Mapping[str, torch.Tensor]) -> dict[str, Floats]:
    """In one transfer per device: one per tensor would wait for the device each time."""
    values: dict[str, Floats] = {}
    for device in {tensor.device for tensor in found.values()}:
        there = {name: tensor for name, tensor in found.items() if tensor.device == device}
        whole = torch.cat([tensor.reshape(-1) for tensor in there.values()]).cpu().numpy()
        ends = np.cumsum([tensor.numel() for tensor in there.values()])
        values.update(zip(there, np.split(whole, ends[:-1]), strict=True))
    return values


def _weights(
    model: nn.Module,
) -> Iterator[tuple[str, Any, nn.Parameter | BaseWeight]]:
    """(name, what tells whether it is tied, how it is read)."""
    for place in places(model):
        module = place.original
        view = weight_of(module) if _has_weight(module) else None
        opaque = view is not None and not isinstance(view, DenseWeight)
        if opaque and view is not None:
            yield _join(place.name, "weight"), module._parameters.get("weight", module), view
        for leaf, parameter in module._parameters.items():
            # Beside the bias, a quantised layer has only codes and scales.
            if parameter is not None and (not opaque or leaf == "bias"):
                yield _join(place.name, leaf), parameter, parameter


def _has_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if is_linear(module):
        return True
    return weight is not None and weight_of(module).quantised is not None


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _tensor(holder: nn.Parameter | BaseWeight) -> Tensor:
    if isinstance(holder, BaseWeight):
        quantised = holder.quantised is not None
        meta = holder.device.type == "meta"
        shape = _shape_of(holder)
        readable = quantised and not meta and holder.why_not_readable is None
        return Tensor(shape, _name(holder.value_dtype), quantised, readable)
    shape = tuple(getattr(holder, "ds_shape", holder.shape))
    plain = type(holder.data) is torch.Tensor and shape == tuple(holder.shape)
    readable = plain and not holder.is_meta and holder.dtype in _READABLE
    return Tensor(shape, _name(holder.dtype), False, readable)


def _shape_of(view: BaseWeight) -> tuple[int, ...]:
    if is_linear(view.layer):
        n_in, n_out = linear_shape(view.layer)
        return (n_out, n_in)
    return tuple(view.layer._parameters["weight"].shape)  # type: ignore[union-attr]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
