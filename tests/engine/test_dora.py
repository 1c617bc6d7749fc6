from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lamina.checkpoint.keys import disk_key, slots
from lamina.checkpoint.origin import plain_key, split_key
from lamina.config import LoraConfig
from lamina.engine.fold import fold, unfold
from lamina.engine.layers import LoraLayer
from lamina.engine.ops import reference
from lamina.engine.variants import dora_norm
from lamina.engine.variants.dora_norm import DoraCaching, row_norms
from lamina.errors import ConfigError, TargetError
from tests import models
from tests.engine.adapters import adapt, layer_of
from tests.engine.test_layers_forward import LAYERS, adapted

KINDS = sorted(LAYERS)


def dora(kind: str, **config: Any) -> tuple[LoraLayer, nn.Module]:
    layer, plain = adapted(kind, use_dora=True, r=2, lora_alpha=6, **config)
    return layer, plain


def by_hand(
    layer: LoraLayer, plain: nn.Module, weight: torch.Tensor, adapter: str = "default"
) -> torch.Tensor:
    """`m * (weight + delta) / norm(W + delta)`, everything dense; `W` is what `plain` has."""
    delta = layer.delta_weight(adapter)
    total = plain.weight + delta
    across = layer.is_embedding or getattr(layer, "fan_in_fan_out", False)
    others = (0,) if across else tuple(range(1, total.dim()))
    norm = total.square().sum(dim=others, keepdim=True).sqrt().detach()
    magnitude = layer.lora_magnitude_vector[adapter].weight
    return magnitude.reshape(norm.shape) * (weight + delta) / norm


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind: str) -> None:
    layer, plain = dora(kind, seed=None)
    x = LAYERS[kind][1]
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_new_adapter_changes_nothing_in_any_dtype(dtype: torch.dtype) -> None:
    model = models.perceptron().to(dtype)
    x = torch.linspace(-1, 1, 48).reshape(3, 16).to(dtype)
    before = model(x)
    adapt(model, seed=None, target_modules=["up", "down"], use_dora=True)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_is_that_of_the_dense_formula(kind: str) -> None:
    layer, plain = dora(kind)
    x = LAYERS[kind][1]
    weight = by_hand(layer, plain, plain.weight)
    torch.testing.assert_close(layer(x), functional_call(plain, {"weight": weight}, (x,)))
    assert not torch.allclose(layer(x), plain(x), atol=1e-2)


# With padding, a dense table gets no gradient for that row, while B and the magnitude do.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "padding" not in kind])
def test_gradients_take_the_norm_as_a_constant(kind: str) -> None:
    layer, plain = dora(kind)
    x = LAYERS[kind][1]
    weigh = torch.sin(torch.arange(layer(x).numel(), dtype=torch.float64)).view_as(layer(x))
    parameters = list(layer.trained_parameters("default"))
    assert len(parameters) == 3
    mine = torch.autograd.grad((layer(x) * weigh).sum(), parameters)
    # delta_weight is differentiable too, so that torch tells what the gradients should be.
    dense = functional_call(plain, {"weight": by_hand(layer, plain, plain.weight)}, (x,))
    wanted = torch.autograd.grad((dense * weigh).sum(), parameters)
    for one, other in zip(mine, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d circular"])
def test_dropout_acts_on_what_the_magnitude_scales_too(kind: str) -> None:
    layer, plain = dora(kind, lora_dropout=0.5)
    x = LAYERS[kind][1]
    layer.train()
    with models.seeded(3):
        mine = layer(x)
    with models.seeded(3):
        dropped = torch.nn.functional.dropout(x, 0.5)
    zero = {"bias": torch.zeros_like(plain.bias)} if plain.bias is not None else {}
    changed = by_hand(layer, plain, plain.weight) - plain.weight
    wanted = plain(x) + functional_call(plain, {"weight": changed, **zero}, (dropped,))
    torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_folding_gives_the_dense_formula_and_unfolding_the_bits(kind: str) -> None:
    layer, plain = dora(kind)
    wanted = by_hand(layer, plain, plain.weight)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer.base_layer.weight, wanted)
    x = LAYERS[kind][1]
    torch.testing.assert_close(layer(x), functional_call(plain, {"weight": wanted}, (x,)))
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, plain.weight)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding", "conv2d"])
def test_several_adapters_rest_on_the_norm_of_the_base_alone(kind: str, one_by_one: bool) -> None:
    model = nn.ModuleDict({"layer": dora(kind)[1]})
    plain = copy.deepcopy(model["layer"])
    state = adapt(model, "lora", target_modules=["layer"], r=3)
    adapt(model, "first", seed=2, target_modules=["layer"], use_dora=True, r=2)
    adapt(model, "second", seed=3, target_modules=["layer"], use_dora=True, r=1)
    layer, x = layer_of(model, "layer"), LAYERS[kind][1]
    weight = plain.weight + layer.delta_weight("lora")
    for name in ("first", "second"):
        weight = by_hand(layer, plain, weight, name)
    wanted = functional_call(plain, {"weight": weight}, (x,))
    torch.testing.assert_close(layer(x), wanted)
    steps = [["lora"], ["first"], ["second"]] if one_by_one else [None]
    for names in steps:
        fold(model, state, names)
        torch.testing.assert_close(layer(x), wanted)
    unfold(model)
    assert torch.equal(layer.base_layer.weight, plain.weight)


def test_the_update_is_told_without_the_magnitude() -> None:
    layer, _ = dora("Conv1D")
    a, b = layer.factors("default")
    torch.testing.assert_close(layer.get_delta_weight("default"), 3 * (b @ a).T)


# --- norms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7 * 5, 10**6])
def test_norms_are_those_of_the_sum_whatever_the_blocks(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_BLOCK", block)
    with models.seeded(1):
        weight, a, b = torch.randn(12, 7), torch.randn(3, 7), torch.randn(12, 3)
    wanted = (weight.double() + 1.5 * b.double() @ a.double()).square().sum(1).sqrt()
    torch.testing.assert_close(row_norms(weight, a, b, 1.5).double(), wanted, rtol=1e-6, atol=0)


def test_norms_survive_an_update_that_all_but_cancels_the_weight() -> None:
    with models.seeded(1):
        a, b = torch.randn(4, 64), torch.randn(8, 4)
        weight = (-(b @ a) + 1e-3 * torch.randn(8, 64)).contiguous()
    wanted = (weight.double() + b.double() @ a.double()).square().sum(1).sqrt()
    torch.testing.assert_close(row_norms(weight, a, b, 1.0).double(), wanted, rtol=1e-3, atol=0)


def test_a_row_of_zeros_is_no_nan() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 3)})
    nn.init.zeros_(model["layer"].weight)
    adapt(model, seed=None, target_modules=["layer"], use_dora=True)
    result = model["layer"](torch.ones(2, 4))
    result.sum().backward()
    assert torch.isfinite(result).all()
    for parameter in layer_of(model, "layer").trained_parameters("default"):
        assert torch.isfinite(parameter.grad).all()


def test_kept_norms_follow_what_changes() -> None:
    layer, _ = dora("linear")
    x, kept = LAYERS["linear"][1], layer.lora_magnitude_vector["default"]._dora_cache
    layer(x)
    assert not kept
    with DoraCaching(), torch.no_grad():
        before = layer(x)
        assert kept
        norm = kept["norm"]
        assert torch.equal(layer(x), before)
        assert kept["norm"] is norm
        layer.lora_B["default"].weight.mul_(2)
        changed = layer(x)
        assert not torch.equal(changed, before)
        layer.set_scale("default", 0.5)
        layer.base_layer.weight.mul_(3)
        last = layer(x)
    torch.testing.assert_close(layer(x), last)
    assert not kept
    with DoraCaching():
        layer(x)
        layer.train()
        assert not kept
        layer(x)
        assert not kept
    DoraCaching()(enabled=True)
    try:
        layer.eval()(x)
        assert kept
        with DoraCaching(enabled=False):
            layer(x)
            assert not kept
    finally:
        DoraCaching()(enabled=False)


# --- what it is refused for ----------------------------------------------------------------------


def test_a_bias_of_b_is_refused() -> None:
    with pytest.raises(ConfigError, match="lora_bias=True is not supported for DoRA"):
        LoraConfig(use_dora=True, lora_bias=True)


def test_a_weight_that_cannot_be_read_is_refused_before_anything_changes() -> None:
    class Packed(nn.Module):
        """Anything linear that keeps its weight to itself."""

        in_features, out_features = 4, 3

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", torch.zeros(6, dtype=torch.uint8))

    model = nn.ModuleDict({"packed": Packed(), "plain": nn.Linear(4, 3)})
    with pytest.raises(TargetError, match="DoRA needs the norms of its weight, and a Packed"):
        adapt(model, target_modules=["packed", "plain"], use_dora=True)
    assert type(model["plain"]) is nn.Linear
    adapt(model, target_modules=["packed", "plain"])


def test_a_quantised_weight_is_read() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    with models.seeded(0):
        plain, x = nn.Linear(64, 8), torch.randn(3, 64)
    quantised = bnb.nn.Linear4bit(64, 8, compute_dtype=torch.float32, quant_type="nf4")
    quantised.load_state_dict(plain.state_dict())
    model = nn.ModuleDict({"layer": quantised.to("cpu")})
    state = adapt(model, target_modules=["layer"], use_dora=True, r=2)
    layer = layer_of(model, "layer")
    weight = layer.weight_view.read().float()
    total = weight + layer.delta_weight("default")
    norm = total.square().sum(1, keepdim=True).sqrt()
    magnitude = layer.lora_magnitude_vector["default"].weight.view(-1, 1)
    with state.while_disabled():
        base = layer(x)
    wanted = base + x @ (magnitude * total / norm - weight).T
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


# --- on disk -------------------------------------------------------------------------------------


def test_the_magnitude_has_a_name_of_its_own_in_the_model_and_on_disk() -> None:
    model = models.perceptron()
    state = adapt(model, "one", target_modules=["up"], use_dora=True)
    assert "up.lora_magnitude_vector.one.weight" in model.state_dict()
    found = slots(model, "one", state)
    assert list(found) == ["up.lora_A.weight", "up.lora_B.weight", "up.lora_magnitude_vector"]
    value = torch.arange(24.0)
    found["up.lora_magnitude_vector"].put(value)
    assert torch.equal(layer_of(model, "up").lora_magnitude_vector["one"].weight, value)
    assert disk_key("up.lora_magnitude_vector.one.weight", "one") == "up.lora_magnitude_vector"
    assert disk_key("up.lora_magnitude_vector.two.weight", "one") is None


@pytest.mark.parametrize("spelt", ["", ".weight", ".default.weight"])
def test_every_spelling_of_a_magnitude_is_understood(spelt: str) -> None:
    plain = plain_key(f"base_model.model.a.b.lora_magnitude_vector{spelt}")
    assert split_key(plain) == ("a.b", "lora_magnitude_vector")


def test_a_deleted_adapter_leaves_no_magnitude() -> None:
    layer, _ = dora("linear")
    layer.delete_adapter("default")
    assert not [name for name, _ in layer.named_parameters() if "lora" in name]
    assert not layer.lora_variant


def test_a_layer_of_another_kind_is_refused_by_name() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TargetError, match="mha: MultiheadAttention does not support DoRA"):
        adapt(model, target_modules=["mha"], use_dora=True)


def test_tensors_may_stand_in_for_the_parameters() -> None:
    model, _ = dora("linear")
    x = torch.linspace(-1, 1, 2 * model.in_features, dtype=model.weight.dtype).view(2, -1)
    own = {name: p.detach() for name, p in model.named_parameters()}
    stacked = {name: torch.stack([p, 1.5 * p]) for name, p in own.items()}
    many = torch.func.vmap(lambda values: torch.func.functional_call(model, values, (x,)))(stacked)
    torch.testing.assert_close(torch.func.functional_call(model, own, (x,)), model(x))
    torch.testing.assert_close(many[0], model(x))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(many[1], model(x))


def test_a_first_norm_is_computed_on_the_accelerator_only_if_asked_and_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, other = torch.device("cpu"), torch.device("meta")
    plain = LoraConfig(use_dora=True)
    asked = LoraConfig(use_dora=True, runtime_config={"ephemeral_gpu_offload": True})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert dora_norm.device_for(asked, cpu) == cpu
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: other)
    assert dora_norm.device_for(plain, cpu) == cpu
    assert dora_norm.device_for(asked, cpu) == other
    # What lies on a device is computed there.
    assert dora_norm.device_for(asked, other) == other
