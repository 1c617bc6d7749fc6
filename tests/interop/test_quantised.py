"""Over quantised bases the drop-in merges as peft does: in place, without being asked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lamina.engine.weights import weight_of
from lamina.interop.peft.adapting import get_peft_model
from lamina.interop.peft.lora_config import LoraConfig
from tests import quantised
from tests.quantised import IN, KINDS, Net

WARNED = {"nf4": "4-bit", "nf4-double": "4-bit", "fp4": "4-bit", "bnb-int8": "8-bit"}


def adapted(kind: str) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False)
    return get_peft_model(Net(KINDS[kind], torch.float32), config)


def values(layer: nn.Module) -> torch.Tensor:
    return weight_of(layer).read().clone()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["model", "layer", "for good"])
def test_it_merges_and_warns_where_peft_warns(kind: str, by: str) -> None:
    model = adapted(kind)
    layer = model.base_model.model.first
    before = values(layer.base_layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if by == "for good":
            merged = model.merge_and_unload().first
        else:
            (model.merge_adapter if by == "model" else layer.merge)()
            merged = layer.base_layer
    told = [str(each.message) for each in caught if "rounding errors" in str(each.message)]
    assert len(told) == (kind in WARNED)
    assert all(WARNED[kind] in message for message in told)
    assert type(merged) is type(KINDS[kind](quantised.dense()))
    assert not torch.equal(values(merged), before)
    if by == "for good":
        return
    (model.unmerge_adapter if by == "model" else layer.unmerge)()
    assert torch.equal(values(layer.base_layer), before)


def test_disabling_a_merged_adapter_gives_the_base() -> None:
    model = adapted("ao-int8").eval()
    x = torch.randn(2, IN)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        model.merge_adapter()
        assert not torch.allclose(model(x), base)
        with model.disable_adapter():
            assert torch.equal(model(x), base)


def test_layers_of_other_quantisers_have_codes_for_a_weight_and_refuse_to_merge() -> None:
    config = LoraConfig(target_modules=["first"])
    model = get_peft_model(Net(quantised.PackedLinear, torch.float32), config)
    layer = model.base_model.model.first
    assert layer.weight is layer.base_layer.qweight
    with pytest.raises(ValueError, match="qweight"):
        model.merge_and_unload()
