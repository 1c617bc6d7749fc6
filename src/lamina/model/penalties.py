"""What some methods add to the loss: terms of the adapters' weights, not of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lamina.engine.layers import LoraLayer, lora_layers
from lamina.engine.state import AdapterState
from lamina.engine.variants.kasa import Kasa, kasa_penalty
from lamina.engine.variants.monteclora import Monteclora, monteclora_penalty


def kasa_loss(
    model: nn.Module, state: AdapterState, adapters: str | Iterable[str] | None = None
) -> torch.Tensor | float:
    """KaSA's penalties, summed over layers; 0.0 where there are none.

    Args:
        model: the adapted model.
        state: its shared state.
        adapters: whose; None means the active ones.
    """
    terms = _terms(model, state, adapters, Kasa, kasa_penalty)
    return sum(terms) if terms else 0.0


def monteclora_loss(
    model: nn.Module, state: AdapterState, adapters: str | Iterable[str] | None = None
) -> torch.Tensor | float:
    """MonteCLoRA's divergence from its priors, the mean over layers; 0.0 where there are none.

    Args:
        model: the adapted model.
        state: its shared state.
        adapters: whose; None means the active ones.
    """
    terms = _terms(model, state, adapters, Monteclora, monteclora_penalty)
    total: torch.Tensor | float = sum(terms)
    return total / len(terms) if terms else 0.0


def _terms(
    model: nn.Module,
    state: AdapterState,
    adapters: str | Iterable[str] | None,
    method: type,
    term: Callable[[LoraLayer, str], Any],
) -> list[Any]:
    names = state.active if adapters is None else adapters
    wanted = (names,) if isinstance(names, str) else tuple(names)
    return [
        term(layer, name)
        for _, layer in lora_layers(model)
        for name in wanted
        if name in layer.records and isinstance(layer.records[name].variant, method)
    ]


class MontecloraTrainerMixin:
    """Adds MonteCLoRA's term to a trainer's loss: `class Mine(MontecloraTrainerMixin, Trainer)`.

    The trainer's `accelerator`, if it has one, tells how the model is wrapped.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The trainer's loss plus the term; with `return_outputs`, the outputs beside it."""
        trainer: Any = super()
        loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True, **kwargs)
        accelerator = getattr(self, "accelerator", None)
        inner = model if accelerator is None else accelerator.unwrap_model(model)
        loss = loss + inner.base_model.monteclora_loss()
        return (loss, outputs) if return_outputs else loss
