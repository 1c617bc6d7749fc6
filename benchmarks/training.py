"""One step of training in fp32: forward, backward, AdamW on the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from benchmarks.cases import adapter
from benchmarks.measure import Case, Side, timed
from benchmarks.models import Sizes, with_weights


def training(sizes: Sizes) -> Iterator[Case]:
    """Two ranks, each without and with dropout."""
    for r in (8, 64):
        for dropout in (0.0, 0.1):

            def prepare(library: ModuleType, r: int = r, dropout: float = dropout) -> Side:
                return step(library, sizes, r, dropout)

            batch, tokens = sizes.batch
            name = f"training step, {batch} x {tokens} tokens, r={r}, dropout {dropout:g}"
            yield Case(name, "ms", prepare, 2 * sizes.repeats - 1)


def step(library: ModuleType, sizes: Sizes, r: int, dropout: float) -> Side:
    """A step of one library on a model of its own."""
    config = adapter(library, r)
    config.lora_dropout = dropout
    base = with_weights(sizes.trained_layers, sizes.trained_hidden)
    model = library.get_peft_model(base, config).train()
    tokens = torch.randint(0, 4096, sizes.batch, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def run() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return lambda: timed(run)
