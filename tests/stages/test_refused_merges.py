"""Stages that can't be begun by merging, and give everything back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.config import LoraConfig
from lamina.errors import (
    FoldError,
    MismatchWarning,
)
from lamina.stages import begin_stage
from tests import models
from tests.stages.chains import (
    llama_lora,
    run_stage,
)
from tests.stages.refusing import named, refused


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb = pytest.importorskip("bitsandbytes")
    model = named()
    for layer in model.model.layers:
        dense = layer.self_attn.q_proj
        packed = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=False, compute_dtype=torch.float32
        )
        packed.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False).to("cpu")
        layer.self_attn.q_proj = packed.eval()
    return model


class Opaque(nn.Module):
    """A linear layer that keeps its weight to itself."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.register_buffer("packed", dense.weight.data.to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype))


def opaque() -> nn.Module:
    model = named()
    attention = model.model.layers[1].self_attn
    attention.v_proj = Opaque(attention.v_proj).eval()
    return model


MERGE = {"name": "x", "mode": "merge", "config": llama_lora()}


@pytest.mark.parametrize(("build", "count"), [(quantised, 2), (opaque, 1)])
def test_merge_on_weights_that_arent_dense(domain: Path, build: Any, count: int) -> None:
    base = build()
    error = refused(base, FoldError, parent=domain, **MERGE)
    assert f"{count} of 4 layers can't be folded into" in str(error)
    assert "stack" in str(error)
    # The same stage can be begun by stacking: it is the dense base, as far as it can be seen.
    stacking = {**MERGE, "mode": "stack", "parent": domain}
    if build is quantised:
        with pytest.warns(MismatchWarning, match="but bitsandbytes fp4.* instead of dense"):
            stacked = begin_stage(base, **stacking)
    else:
        stacked = begin_stage(base, **stacking)
    assert stacked.active_adapters == ["domain", "x"]


def test_merge_on_tied_weights(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return models.embedding_net(tied=True)

    run_stage(tmp_path / "one", LoraConfig(r=4, target_modules=["embed"]), build=build)
    config = LoraConfig(r=4, target_modules=["head"])
    call = {"name": "x", "parent": tmp_path / "one", "mode": "merge", "config": config}
    assert "tied to head" in str(refused(build(), FoldError, **call))


def test_a_refused_merge_gives_trained_biases_and_heads_back(tmp_path: Path) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 8)
            self.conv = nn.Conv1d(8, 8, 1, groups=2)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(self.up(x).unsqueeze(-1)).squeeze(-1))

    def build() -> nn.Module:
        with models.seeded(0):
            return Biased().eval()

    config = LoraConfig(r=4, target_modules=["up", "conv"], bias="all", modules_to_save=["head"])
    run_stage(tmp_path / "one", config, build=build)
    base = build()
    again = LoraConfig(r=2, target_modules=["up"])
    error = refused(base, FoldError, name="x", parent=tmp_path / "one", mode="merge", config=again)
    assert "groups" in str(error)
    x = torch.ones(1, 16)
    assert torch.equal(base(x), build()(x))
