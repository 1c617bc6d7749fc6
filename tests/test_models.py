from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from tests import models

FACTORIES: dict[str, Callable[..., nn.Module]] = {
    "llama": models.tiny_llama,
    "gpt2": models.tiny_gpt2,
    "bert": models.tiny_bert_classifier,
    "perceptron": models.perceptron,
    "convolution": partial(models.convolution_net, 2),
    "embedding": models.embedding_net,
}


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", FACTORIES)
def test_a_seed_decides_the_weights_and_leaves_the_random_state_alone(name: str) -> None:
    make = FACTORIES[name]
    first = weights(make())
    before = torch.get_rng_state()
    assert torch.equal(weights(make()), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(weights(make(seed=1)), first)


def test_the_transformers_models_run_and_take_changes() -> None:
    ids = models.token_ids()
    assert models.tiny_llama()(ids).logits.shape == (2, 12, models.VOCABULARY)
    assert models.tiny_gpt2(n_layer=1)(ids).logits.shape == (2, 12, models.VOCABULARY)
    assert models.tiny_bert_classifier(num_labels=5)(ids).logits.shape == (2, 5)


def test_the_plain_models_run() -> None:
    assert models.perceptron()(torch.randn(2, 16)).shape == (2, 8)
    for dimensions in models.CONVOLUTIONS:
        x = torch.randn(2, 3, *[8] * dimensions)
        assert models.convolution_net(dimensions)(x).shape == (2, 5)
    tied = models.embedding_net(tied=True)
    assert tied(models.token_ids()).shape == (2, models.VOCABULARY)
    assert tied.head.weight is tied.embed.weight
