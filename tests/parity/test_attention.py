"""`nn.MultiheadAttention`, against the real peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lamina
from tests import models
from tests.parity.pairs import assert_close, gradients, pair


class Attention(nn.Module):
    def __init__(self, cross: int, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 4, **options)
        self.head = nn.Linear(16, 5)
        self.cross = cross

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = x if self.cross == 0 else 2 * x.flip(0)
        value = key + 1 if self.cross == 2 else key
        out: torch.Tensor = self.head(self.mha(x, key, value)[0])
        return out


def make(cross: int = 0, **options: Any) -> nn.Module:
    with models.seeded(0):
        return Attention(cross, **options).eval()


def inputs() -> torch.Tensor:
    with models.seeded(4):
        return torch.randn(3, 6, 16)


@pytest.mark.parametrize("cross", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}])
def test_both_projections_answer_as_in_peft(cross: int, options: dict[str, Any]) -> None:
    config: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["mha", "head"]}
    ours, theirs = pair(lambda: make(cross, **options), **config)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    assert_close(ours(inputs()), theirs(inputs()), 1e-5)
    mine, other = gradients(ours, inputs()), gradients(theirs, inputs())
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        # peft's function has this update twice, its gradient once.
        times = 2 if "out_proj" in name else 1
        assert_close(mine[name], times * gradient, 1e-4)


def test_files_and_folds_agree(tmp_path: Path) -> None:
    ours, theirs = pair(make, r=3, target_modules=["mha"])
    expected = theirs(inputs())
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    opened = lamina.PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    assert_close(opened(inputs()), expected, 1e-5)
    reopened = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert_close(reopened(inputs()), expected, 1e-5)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.merge_adapter()
    assert_close(ours(inputs()), expected, 1e-5)
    ours.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    with ours.disable_adapter():
        assert torch.equal(ours(inputs()), make()(inputs()))
    bare = ours.merge_and_unload()
    assert type(bare.mha) is nn.MultiheadAttention
    assert bare.state_dict().keys() == make().state_dict().keys()
    assert_close(bare(inputs()), expected, 1e-5)


def test_inputs_of_both_projections_are_dropped() -> None:
    config = lamina.LoraConfig(
        r=3, target_modules=["mha"], lora_dropout=0.5, init_lora_weights=False
    )
    model = lamina.get_peft_model(make(), config).train()
    torch.manual_seed(0)
    first = model(inputs())
    second = model(inputs())
    assert not torch.allclose(first, second)
    assert torch.equal(model.eval()(inputs()), model(inputs()))


def test_an_attention_over_other_widths_is_refused() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 4, kdim=8)})
    with pytest.raises(lamina.errors.TargetError, match="Only same embed"):
        lamina.get_peft_model(model, lamina.LoraConfig(target_modules=["mha"]))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_output_projections_bias_trains_along(tmp_path: Path, bias: str) -> None:
    ours, theirs = pair(make, r=3, target_modules=["mha"], bias=bias)
    expected = theirs(inputs())
    assert_close(ours(inputs()), expected, 1e-5)
    theirs.save_pretrained(tmp_path)
    opened = lamina.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert_close(opened(inputs()), expected, 1e-5)
