"""The models: Llamas with random weights, built once and copied."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LINEARS_PER_LAYER = 7


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        layers: of the deep model; seven linears each.
        hidden: its width.
        adapters: how many are present where many are.
        trained_layers: of the model that is trained.
        trained_hidden: its width.
        batch: batch x tokens of a training step.
        repeats: of a case that takes long; quick ones are repeated more often.
        whole_imports: also measure the import of everything, not of the package alone.
    """

    layers: int = 36
    hidden: int = 512
    adapters: tuple[int, ...] = (1, 10, 30)
    trained_layers: int = 4
    trained_hidden: int = 512
    batch: tuple[int, int] = (2, 256)
    repeats: int = 5
    whole_imports: bool = True

    @property
    def linears(self) -> int:
        return LINEARS_PER_LAYER * self.layers


FULL = Sizes()
TINY = Sizes(
    layers=2,
    hidden=32,
    adapters=(1, 3),
    trained_layers=1,
    trained_hidden=32,
    batch=(1, 8),
    repeats=1,
    whole_imports=False,
)


def _config(layers: int, hidden: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=512,
    )


def on_meta(layers: int, hidden: int) -> LlamaForCausalLM:
    """A fresh model without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(_config(layers, hidden))


@functools.lru_cache(maxsize=1)
def _template(layers: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(_config(layers, hidden))


def with_weights(layers: int, hidden: int) -> LlamaForCausalLM:
    """A fresh model with weights of its own, the same at each call."""
    return copy.deepcopy(_template(layers, hidden))
