"""What holds for LoRA over every kind of base weight: dense, quantised, or known to itself alone.

The reference is the same LoRA over a dense layer that holds the dequantised values.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.engine.weights import weight_of
from tests import quantised
from tests.quantised import IN, KINDS, OUT, Net

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALL: dict[str, Any] = {"dense": lambda source: source, **KINDS, "packed": quantised.PackedLinear}
FOLDABLE = [name for name in ALL if name != "packed"]
TARGETS = ["first", "second"]
# Products in the base's own arithmetic: bf16 on the CPU, or activations in 8 bits.
ROUGH = 2e-2


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def config(**settings: Any) -> lamina.LoraConfig:
    return lamina.LoraConfig(
        **{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **settings}
    )


def adapted(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Two layers of a kind under LoRA with random factors, ready to train."""
    torch.manual_seed(7)
    return lamina.get_peft_model(Net(ALL[kind], dtype), config(**settings)).train()


def reference(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The same LoRA over dense layers with the dequantised values."""

    def dense(source: nn.Linear) -> nn.Linear:
        layer = copy.deepcopy(source)
        layer.weight.data = dequantised(ALL[kind](source)).to(dtype)
        return layer

    torch.manual_seed(7)
    return lamina.get_peft_model(Net(dense, dtype), config(**settings)).train()


def dequantised(layer: nn.Module) -> Tensor:
    if isinstance(layer, quantised.PackedLinear):
        return layer.qweight.T * layer.scales
    return weight_of(layer).read().clone()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).abs().max()
    return float(difference / expected.abs().max())


def bound(kind: str, dtype: torch.dtype) -> float:
    rough = dtype == torch.bfloat16 or kind == "ao-int8-dynamic"
    return ROUGH if rough else 1e-5


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    model(x).float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", ALL)
def test_forward_and_gradients_are_those_over_the_dequantised_layer(
    kind: str, precision: str
) -> None:
    dtype = DTYPES[precision]
    model, other = adapted(kind, dtype), reference(kind, dtype)
    x = inputs(dtype)
    assert model(x).dtype == dtype
    assert error(model(x), other(x)) <= bound(kind, dtype)
    expected = gradients(other, x)
    actual = gradients(model, x)
    assert actual.keys() == expected.keys()
    assert len(actual) == 4
    for name, gradient in actual.items():
        # Adapters stay in fp32 over half precision and codes.
        assert gradient.dtype == torch.float32
        assert error(gradient, expected[name]) <= bound(kind, dtype), name


@pytest.mark.parametrize("kind", ALL)
def test_training_goes_on_after_inference(kind: str) -> None:
    model, other = adapted(kind), reference(kind)
    # On a CPU with AVX512-BF16, bitsandbytes packs its weights here, and rounds scales to bf16.
    with torch.no_grad():
        model.eval()(inputs())
    expected = gradients(other, inputs())
    for name, gradient in gradients(model.train(), inputs()).items():
        assert error(gradient, expected[name]) <= ROUGH, name


@pytest.mark.parametrize("kind", ALL)
def test_gradients_reach_what_lies_before(kind: str) -> None:
    model, other = adapted(kind), reference(kind)
    x, y = inputs().requires_grad_(), inputs().requires_grad_()
    model(x).sum().backward()
    other(y).sum().backward()
    assert error(x.grad, y.grad) <= bound(kind, torch.float32)


@pytest.mark.parametrize("kind", ALL)
def test_training_lowers_the_loss_and_leaves_the_base(kind: str) -> None:
    model = adapted(kind, init_lora_weights=True, lora_dropout=0.1)
    before = {n: dequantised(getattr(model.get_base_model(), n).base_layer) for n in TARGETS}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = (model(inputs()) - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    for name, weight in before.items():
        assert torch.equal(dequantised(getattr(model.get_base_model(), name).base_layer), weight)


@pytest.mark.parametrize("kind", ALL)
def test_dropout_hits_the_adapter_alone(kind: str) -> None:
    model = adapted(kind, lora_dropout=0.5)
    one, two = model(inputs()), model(inputs())
    assert not torch.equal(one, two)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), model(inputs()))
    model.eval()
    assert torch.equal(model(inputs()), model(inputs()))


@pytest.mark.parametrize("kind", ALL)
def test_disabled_and_several_adapters(kind: str) -> None:
    base = Net(ALL[kind], torch.float32).eval()
    model = adapted(kind).eval()
    with torch.no_grad():
        expected = base(inputs())
        first = model(inputs())
        with model.disable_adapter():
            assert torch.equal(model(inputs()), expected)
        assert torch.equal(model(inputs()), first)
        model.add_adapter("other", config(r=2))
        assert torch.equal(model(inputs()), first)
        model.set_adapter("other")
        other = model(inputs())
        model.set_adapter(["default", "other"])
        both = model(inputs())
        model.delete_adapter("default")
        assert torch.equal(model(inputs()), other)
    assert not torch.equal(other, first)
    assert not torch.equal(both, first)


@pytest.mark.parametrize("kind", ALL)
def test_a_saved_adapter_answers_the_same_after_loading(kind: str, tmp_path: Path) -> None:
    model = adapted(kind).eval()
    model.save_pretrained(tmp_path)
    loaded = lamina.PeftModel.from_pretrained(Net(ALL[kind], torch.float32), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(inputs()), model(inputs()))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", FOLDABLE)
def test_three_folds_come_out_bit_for_bit(kind: str, precision: str) -> None:
    dtype = DTYPES[precision]
    model = adapted(kind, dtype).eval()
    model.add_adapter("other", config(r=2))
    x = inputs(dtype)
    with torch.no_grad():
        before = model(x)
        stored = [bits(getattr(model.get_base_model(), name).base_layer) for name in TARGETS]
        for names in (["default"], ["default", "other"], ["other"]):
            model.merge_adapter(names, safe_merge=True, target="quantized")
            assert not all(
                same(bits(getattr(model.get_base_model(), name).base_layer), old)
                for name, old in zip(TARGETS, stored, strict=True)
            )
            with model.disable_adapter():
                assert torch.isfinite(model(x)).all()
            model.unmerge_adapter()
            for name, old in zip(TARGETS, stored, strict=True):
                assert same(bits(getattr(model.get_base_model(), name).base_layer), old)
            assert torch.equal(model(x), before)


def bits(layer: nn.Module) -> dict[str, Tensor]:
    """Everything a layer stores, copied."""
    return {name: value.clone() for name, value in tensors(layer)}


def tensors(owner: Any, prefix: str = "", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    parts = dict(getattr(owner, "__dict__", {}))
    parts |= parts.pop("_parameters", {}) | parts.pop("_buffers", {}) | parts.pop("meta", {})
    for name, value in parts.items():
        # The state of an 8-bit layer is filled by its forward.
        if name in ("module", "layer", "state", "CB", "SCB"):
            continue
        if isinstance(value, Tensor):
            if not hasattr(value, "__tensor_flatten__"):
                yield prefix + name, value.detach()
            yield from tensors(value, f"{prefix}{name}.", depth - 1)
        elif (depth and dataclasses.is_dataclass(value)) or hasattr(value, "absmax"):
            yield from tensors(value, f"{prefix}{name}.", depth - 1)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@pytest.mark.parametrize("kind", FOLDABLE)
def test_a_fold_is_the_sum_rounded_to_the_codes_once(kind: str) -> None:
    model = adapted(kind).eval()
    model.add_adapter("other", config(r=2))
    layer = model.get_base_model().first
    expected = dequantised(layer.base_layer).float()
    for name in ("default", "other"):
        a, b = layer.factors(name)
        expected += layer.scaling[name] * b.detach() @ a.detach()
    source = quantised.dense()
    source.weight.data = expected
    # One after the other rounds no more often than both at once.
    model.merge_adapter(["default"], target="quantized")
    model.merge_adapter(["other"], target="quantized")
    fresh = dequantised(ALL[kind](source))
    assert error(dequantised(layer.base_layer), fresh) <= 1e-6
    assert layer.base_layer.bias is not None
    assert torch.equal(layer.base_layer.bias.float(), quantised.dense().bias)


@pytest.mark.parametrize("kind", FOLDABLE)
def test_merged_for_good_to_codes(kind: str) -> None:
    model = adapted(kind).eval()
    with torch.no_grad():
        model.merge_adapter(target="quantized")
        expected = model(inputs())
        model.unmerge_adapter()
        merged = model.merge_and_unload(target="quantized")
        assert type(merged.first) is type(ALL[kind](quantised.dense()))
        assert torch.equal(merged(inputs()), expected)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_for_good_to_dense_layers(kind: str, dtype: torch.dtype | None) -> None:
    model = adapted(kind).eval()
    layer = model.get_base_model().first
    a, b = (factor.detach() for factor in layer.factors("default"))
    expected = dequantised(layer.base_layer).float() + layer.scaling["default"] * b @ a
    before = dequantised(layer.base_layer).float()
    merged = model.merge_and_unload(target="dequantized", dtype=dtype)
    assert type(merged.first) is nn.Linear
    assert type(merged.first.weight) is nn.Parameter
    assert merged.first.weight.dtype == (dtype or torch.float32)
    assert (merged.first.in_features, merged.first.out_features) == (IN, OUT)
    tolerance = {torch.bfloat16: 2**-8}.get(dtype or torch.float32, 1e-6)
    assert error(merged.first.weight, expected) <= tolerance
    assert error(merged.first.weight, before) > 0.1
    assert not merged.first.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_without_a_target_is_refused_with_both_names(kind: str) -> None:
    model = adapted(kind)
    before = [dequantised(getattr(model.get_base_model(), name).base_layer) for name in TARGETS]
    for refused in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(lamina.FoldError, match="2 of 2 layers") as caught:
            refused()
        assert "target='quantized'" in str(caught.value)
        assert "target='dequantized'" in str(caught.value)
    for name, old in zip(TARGETS, before, strict=True):
        assert torch.equal(dequantised(getattr(model.get_base_model(), name).base_layer), old)


def test_what_only_the_layer_reads_is_refused_whatever_the_target() -> None:
    model = adapted("packed")
    for settings in ({}, {"target": "quantized"}, {"target": "dequantized"}):
        with pytest.raises(lamina.FoldError, match="a PackedLinear holds a quantised weight"):
            model.merge_and_unload(**settings)
    assert model.get_base_model().first.weight.dtype == torch.int32


@pytest.mark.parametrize("kind", ALL)
def test_all_kinds_are_linear_layers(kind: str) -> None:
    assert lamina.find_all_linear_names(Net(ALL[kind], torch.float32)) == [
        "first",
        "narrow",
        "second",
    ]
    everywhere = adapted(kind, target_modules="all-linear")
    assert everywhere.get_nb_trainable_parameters()[0] == 3 * 4 * (IN + OUT)


@pytest.mark.parametrize("kind", FOLDABLE)
def test_dora_over_every_readable_weight(kind: str) -> None:
    model, other = adapted(kind, use_dora=True), reference(kind, use_dora=True)
    assert error(model(inputs()), other(inputs())) <= bound(kind, torch.float32)
    expected = gradients(other, inputs())
    actual = gradients(model, inputs())
    assert len(actual) == 6
    for name, gradient in actual.items():
        assert error(gradient, expected[name]) <= bound(kind, torch.float32), name


def test_what_bits_and_settings_a_weight_says() -> None:
    said = {kind: weight_of(KINDS[kind](quantised.dense())).quantised for kind in KINDS}
    assert said == {
        "nf4": "bitsandbytes nf4",
        "nf4-double": "bitsandbytes nf4, double quantisation",
        "fp4": "bitsandbytes fp4",
        "bnb-int8": "bitsandbytes int8",
        "ao-int8": "torchao Int8Tensor",
        "ao-int8-dynamic": "torchao Int8Tensor, quantised activations",
        "ao-int4": "torchao IntxUnpackedToInt8Tensor",
        "ao-float8": "torchao Float8Tensor",
        "hqq-4bit": "hqq 4-bit, groups of 32",
        "hqq-8bit": "hqq 8-bit, groups of 32",
    }
