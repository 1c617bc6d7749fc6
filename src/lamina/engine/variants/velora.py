"""VeLoRA: LoRA that keeps its inputs for the backward in a fraction of their memory.

Source: arXiv:2405.17991.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.engine.buffers import BufferDict
from lamina.engine.ops.velora import VeloraFunction, group_size, grouped, normalised
from lamina.engine.variants.base import Update
from lamina.engine.variants.plain import PlainLora

_PLACE = "lora_velora_embed"
_FILLED = "lora_velora_initialized"


class Velora(PlainLora):
    """Plain LoRA in what it computes; the gradient of A comes from the inputs' projections.

    The direction that they are projected on is drawn ("random"), or the mean of the groups of the
    first batch in training ("batch_average_once"), or of each ("batch_average").
    """

    is_plain = False
    buffers = (_PLACE,)
    kinds = ("linear",)

    def prepare(self, layer: Update, adapter: str, dtype: torch.dtype) -> None:
        A_RI = layer.factors(adapter)[0]
        size = group_size(A_RI.shape[1], _settings(layer, adapter).num_groups)
        held: Any = layer
        if not isinstance(getattr(held, _PLACE, None), BufferDict):
            setattr(held, _PLACE, BufferDict(persistent=True))
            setattr(held, _FILLED, {})
        getattr(held, _PLACE)[adapter] = torch.empty(size, device="meta", dtype=dtype)
        # What comes from a file counts as a first batch that has been seen.
        getattr(held, _FILLED)[adapter] = True

    @torch.no_grad()
    def begin(self, layer: Update, adapter: str) -> None:
        held: Any = layer
        directions = getattr(held, _PLACE)
        drawn = _settings(layer, adapter).init_type == "random"
        getattr(held, _FILLED)[adapter] = drawn
        device = layer.factors(adapter)[0].device
        direction = torch.zeros_like(directions[adapter], device=device)
        if drawn:
            direction = normalised(torch.randn_like(direction)).to(direction.dtype)
        directions[adapter] = direction

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        if not (layer.training and torch.is_grad_enabled()):
            return super().add(layer, adapter, x, result)
        held: Any = layer
        settings = _settings(layer, adapter)
        dropped = layer.dropped(adapter, x)
        self._learn(held, adapter, dropped)
        product: Any = VeloraFunction.apply
        lifted = product(
            dropped,
            layer.factors(adapter)[0],
            None,
            getattr(held, _PLACE)[adapter],
            settings.num_groups,
            settings.scale,
        )
        update: torch.Tensor = held.lora_B[adapter](lifted) * layer.records[adapter].scaling
        return result + update

    def end(self, layer: Update, adapter: str) -> None:
        getattr(layer, _FILLED).pop(adapter, None)

    @torch.no_grad()
    def _learn(self, layer: Any, adapter: str, x: torch.Tensor) -> None:
        settings = _settings(layer, adapter)
        filled = getattr(layer, _FILLED)
        once = settings.init_type == "batch_average_once"
        if settings.init_type == "random" or (once and filled[adapter]):
            return
        groups = grouped(x.detach(), settings.num_groups)
        directions = getattr(layer, _PLACE)
        directions[adapter] = normalised(groups.flatten(0, 1).mean(0)).to(directions[adapter])
        filled[adapter] = True


def _settings(layer: Any, adapter: str) -> Any:
    return layer.records[adapter].config.velora_config
