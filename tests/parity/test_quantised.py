"""Over quantised layers: the same outputs, gradients and merges as with the real peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import lamina
from lamina.engine.weights import weight_of
from tests import models
from tests.parity import pairs
from tests.quantised import IN, KINDS, Net

BITSANDBYTES = {"nf4": 4, "nf4-double": 4, "fp4": 4, "bnb-int8": 8}
TARGETS = ["first", "second"]
# In fp32; peft multiplies by the scaling after B, Lamina's order may differ in the last bit.
CLOSE = 2e-6
# How far apart two neighbouring codes are, as a share of the largest weight.
STEP = {"nf4": 0.31, "nf4-double": 0.31, "fp4": 0.34, "hqq-4bit": 2 / 15}


def requantiser(kind: str) -> Any:
    """torchao's config of a kind, as transformers keeps it for peft."""
    import torchao.quantization as ao

    made = {
        "ao-int8": ao.Int8WeightOnlyConfig,
        "ao-int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "ao-float8": ao.Float8WeightOnlyConfig,
    }
    if kind in made:
        return made[kind]()
    return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.granularity.PerGroup(32))


def net(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Two layers of a kind, marked as transformers marks a model that it has quantised."""
    model: Any = Net(KINDS[kind], dtype)
    if kind in BITSANDBYTES:
        setattr(model, f"is_loaded_in_{BITSANDBYTES[kind]}bit", True)
    if kind.startswith("ao"):
        settings = SimpleNamespace(get_apply_tensor_subclass=lambda: requantiser(kind))
        model.hf_quantizer = SimpleNamespace(quantization_config=settings)
    return model


@contextmanager
def lenient() -> Iterator[None]:
    """peft warns of the rounding of every merge."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*may get different generations.*")
        yield


def pair(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
    ours, theirs = pairs.pair(lambda: net(kind, dtype), **config)
    # In training, bitsandbytes leaves the weights as peft reads them.
    return ours.train(), theirs.train()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    with models.seeded(9):
        return torch.randn(3, 5, IN).to(dtype)


def weight(model: Any, name: str) -> Tensor:
    layer = getattr(model, name)
    return weight_of(getattr(layer, "base_layer", layer)).read().float()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_knows_the_kind(kind: str) -> None:
    _, theirs = pair(kind)
    names = {type(theirs.base_model.model.first).__name__}
    expected = {
        "nf4": "Linear4bit",
        "nf4-double": "Linear4bit",
        "fp4": "Linear4bit",
        "bnb-int8": "Linear8bitLt",
        "hqq-4bit": "HqqLoraLinear",
        "hqq-8bit": "HqqLoraLinear",
    }
    assert names == {expected.get(kind, "TorchaoLoraLinear")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_dtypes_agree(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(kind, dtype)
    for (mine, a), (other, b) in zip(
        sorted(pairs.trained(ours).items()), sorted(pairs.trained(theirs).items()), strict=True
    ):
        assert (mine, a.dtype, a.shape) == (other, b.dtype, b.shape)
    tolerance = CLOSE if dtype == torch.float32 else 1e-2
    pairs.assert_close(ours(inputs(dtype)), theirs(inputs(dtype)), tolerance)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ao-int8-dynamic"])
def test_gradients_agree(kind: str) -> None:
    ours, theirs = pair(kind)
    mine, other = pairs.gradients(ours, inputs()), pairs.gradients(theirs, inputs())
    assert mine.keys() == other.keys()
    for name, gradient in mine.items():
        pairs.assert_close(gradient, other[name], 1e-5)


def test_peft_loses_gradients_behind_quantised_activations_and_lamina_does_not() -> None:
    ours, theirs = pair("ao-int8-dynamic")
    mine, other = pairs.gradients(ours, inputs()), pairs.gradients(theirs, inputs())
    # The same where nothing quantised lies behind.
    last = [name for name in mine if "second" in name]
    assert len(last) == 2
    for name in last:
        pairs.assert_close(mine[name], other[name], 1e-5)
    first = next(name for name in mine if "first" in name and "lora_B" in name)
    # Int8 activations hardly change the output, so nor should they the gradient.
    dense = pairs.gradients(pair("ao-int8")[0], inputs())[first]
    largest = dense.abs().max()
    assert (mine[first] - dense).abs().max() < 0.02 * largest
    assert (other[first] - dense).abs().max() > 0.05 * largest


@pytest.mark.parametrize("kind", KINDS)
def test_dora_agrees(kind: str) -> None:
    ours, theirs = pair(kind, use_dora=True)
    pairs.assert_close(ours(inputs()), theirs(inputs()), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merges_agree_within_a_code(kind: str) -> None:
    ours, theirs = pair(kind)
    start = {name: weight(ours.base_model.model, name) for name in TARGETS}
    ours.merge_adapter(target="quantized", safe_merge=True)
    with lenient():
        theirs.merge_adapter(safe_merge=True)
    for name in TARGETS:
        mine = weight(ours.base_model.model, name)
        other = weight(theirs.base_model.model, name)
        assert not torch.equal(mine, start[name])
        largest = other.abs().max()
        assert (mine - other).abs().max() <= STEP.get(kind, 1 / 8) * largest
        # A sum that lies between two codes may go to either; few do.
        assert ((mine - other).abs() > 1e-5 * largest).float().mean() <= 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_is_exact_where_peft_rounds_again(kind: str) -> None:
    ours, theirs = pair(kind)
    start = weight(ours.base_model.model, "first")
    ours.merge_adapter(target="quantized")
    ours.unmerge_adapter()
    assert torch.equal(weight(ours.base_model.model, "first"), start)
    with lenient():
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    assert not torch.equal(weight(theirs.base_model.model, "first"), start)


def test_a_merge_keeps_the_bias_that_peft_drops_with_hqq() -> None:
    ours, theirs = pair("hqq-8bit")
    before = ours(inputs())
    ours.merge_adapter(target="quantized")
    theirs.merge_adapter()
    assert theirs.base_model.model.first.base_layer.bias is None
    assert (ours(inputs()) - before).abs().max() < 0.02 * before.abs().max()
    assert (theirs(inputs()) - before).abs().max() > 0.02 * before.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "bnb-int8", "ao-int8", "hqq-8bit"])
def test_files_cross_over(kind: str, tmp_path: Any) -> None:
    ours, theirs = pair(kind)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine = lamina.PeftModel.from_pretrained(net(kind), tmp_path / "theirs").train()
    other = peft.PeftModel.from_pretrained(net(kind), tmp_path / "ours").train()
    pairs.assert_close(mine(inputs()), other(inputs()), CLOSE)
    pairs.assert_close(mine(inputs()), ours(inputs()), CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_alike(kind: str) -> None:
    ours, theirs = pair(kind)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
