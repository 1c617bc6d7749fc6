"""A few rows at a time have the bits of the whole, and no sum is off by more than a rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lamina.checkpoint.stream.changes import Folded, changes_of
from lamina.engine.layers import lora_layers
from lamina.engine.ops import reference
from tests import models
from tests.engine.adapters import adapt


class Experts(nn.Module):
    """Five experts of 6 x 9 in one parameter, or with (in, out) swapped."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(5, 6, 9))


def holder(kind: str) -> nn.Module:
    made: dict[str, Any] = {
        "linear": lambda: nn.Linear(19, 301),
        "conv1d": lambda: Conv1D(19, 301),
        "embedding": lambda: nn.Embedding(301, 19),
        "experts": lambda: Experts(is_transposed=False),
        "experts, transposed": lambda: Experts(is_transposed=True),
    }
    with models.seeded(3):
        return nn.ModuleDict({"layer": made[kind.removesuffix(", dora")]()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize(
    "kind", ["linear", "linear, dora", "conv1d", "embedding", "experts", "experts, transposed"]
)
def test_rows_have_the_bits_of_the_whole(
    kind: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_BLOCK", rows * 19)
    model = holder(kind).to(dtype)
    experts = kind.startswith("experts")
    state = adapt(
        model,
        r=3,
        lora_alpha=7,
        use_dora=kind.endswith("dora"),
        target_modules=[] if experts else ["layer"],
        target_parameters=["layer.weight"] if experts else None,
    )
    (layer,) = [layer for _, layer in lora_layers(model)]
    wanted = layer.folded(["default"])[0].to(dtype)
    value = layer.weight_view.read().clone()
    module = layer.get_base_layer()
    module.weight = nn.Parameter(value.to("meta"))
    change = changes_of(model, "default", state, set()).values["layer.weight"].change
    assert isinstance(change, Folded)
    step = change.rows(value.shape)
    assert step == (1 if experts else rows)
    parts = []
    for begin in range(0, len(value), step):
        taken = slice(begin, min(begin + step, len(value)))
        parts.append(change.part(value[taken].clone(), taken, dtype))
    assert torch.equal(torch.cat(parts), wanted)
    assert not torch.equal(wanted, value)
    assert torch.equal(change.of(value, dtype), wanted)
    assert module.weight.is_meta
