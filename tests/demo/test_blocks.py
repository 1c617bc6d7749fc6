from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lamina.demo.blocks import blocks, perplexity


class OneTokenPerCharacter:
    """Stands in for a tokenizer: a character's token is its code point."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(character) for character in text]}


class Certain(torch.nn.Module):
    """A model whose loss on a batch is the mean of the batch's first tokens."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        assert torch.equal(input_ids, labels)
        assert not self.training
        return SimpleNamespace(loss=input_ids[:, 0].float().mean())


def test_blocks_follow_the_text_and_leave_out_the_rest() -> None:
    data = blocks(OneTokenPerCharacter(), "abcdefgh", length=3)
    assert data.dtype == torch.int64
    assert data.tolist() == [[97, 98, 99], [100, 101, 102]]


def test_limit_keeps_the_first_blocks() -> None:
    assert blocks(OneTokenPerCharacter(), "abcdef", length=2, limit=1).tolist() == [[97, 98]]


def test_too_short_a_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 tokens do not fill one block of 3"):
        blocks(OneTokenPerCharacter(), "ab", length=3)


def test_perplexity_weighs_every_block_alike_and_restores_the_mode() -> None:
    model = Certain().train()
    data = torch.tensor([[0, 9], [1, 9], [2, 9], [3, 9], [4, 9]])
    # The last batch is smaller; a mean of batch means would be exp(2.5).
    assert perplexity(model, data, batch_size=4) == pytest.approx(math.exp(2.0))
    assert model.training
