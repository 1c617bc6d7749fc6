"""Tiny models with random weights: the same seed gives the same weights, in any order of calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 64
HIDDEN = 32
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside; the random state outside goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers with grouped key/value heads, in eval mode."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with seeded(seed):
        return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def tiny_gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """A GPT-2 of two layers: its linears are transformers' Conv1D (weight is in x out)."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": HIDDEN,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with seeded(seed):
        return GPT2LMHeadModel(GPT2Config(**settings | changes)).eval()


def tiny_bert_classifier(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    """A BERT of two layers with a new head of three labels, as `modules_to_save` wants it."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    with seeded(seed):
        return BertForSequenceClassification(BertConfig(**settings | changes)).eval()


def token_ids(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids, batch x length, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


class Perceptron(nn.Module):
    """Two linears with a dropout between; `forward` takes batch x 16 and gives batch x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))


class ConvolutionNet(nn.Module):
    """Convolutions that differ in all they can: stride, padding, dilation, groups, bias.

    `forward` takes batch x 3 x size (`dimensions` times) and gives batch x 5; size is at least 8.
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dimensions]
        self.stem = convolution(3, 8, 3, padding=1)
        self.strided = convolution(8, 8, 3, stride=2, padding=1, bias=False)
        self.grouped = convolution(8, 12, 3, padding=2, dilation=2, groups=2)
        self.pointwise = convolution(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.strided(x))
        x = self.pointwise(torch.relu(self.grouped(x)))
        return x.flatten(2).mean(-1)


class EmbeddingNet(nn.Module):
    """An embedding with a padding row, and a head: batch x length ids to batch x vocabulary."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=0)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))


def perceptron(seed: int = 0) -> Perceptron:
    """A seeded `Perceptron` in eval mode."""
    with seeded(seed):
        return Perceptron().eval()


def convolution_net(dimensions: int, seed: int = 0) -> ConvolutionNet:
    """A seeded `ConvolutionNet` over 1, 2 or 3 dimensions, in eval mode."""
    with seeded(seed):
        return ConvolutionNet(dimensions).eval()


def embedding_net(seed: int = 0, *, tied: bool = False) -> EmbeddingNet:
    """A seeded `EmbeddingNet` in eval mode."""
    with seeded(seed):
        return EmbeddingNet(tied=tied).eval()
