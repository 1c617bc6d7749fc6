"""Layers built by hand, against the real peft's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lamina
from lamina.interop.peft import kinds
from lamina.interop.peft.adapting import get_peft_model
from lamina.interop.peft.lora_config import LoraConfig
from tests.parity.both import BOTH, seeded

BUILT = {
    "linear": (lambda: nn.Linear(6, 5), "Linear", torch.randn(3, 6), {}),
    "conv1d": (lambda: Conv1D(5, 6), "Linear", torch.randn(3, 6), {"fan_in_fan_out": True}),
    "embedding": (lambda: nn.Embedding(7, 5), "Embedding", torch.tensor([[0, 3, 6]]), {}),
    "conv1": (lambda: nn.Conv1d(2, 4, 3), "Conv1d", torch.randn(2, 2, 6), {}),
    "conv2": (lambda: nn.Conv2d(2, 4, 3), "Conv2d", torch.randn(2, 2, 6, 6), {}),
    "conv3": (lambda: nn.Conv3d(2, 4, 2), "Conv3d", torch.randn(2, 2, 4, 4, 4), {}),
    "dora": (lambda: nn.Linear(6, 5), "Linear", torch.randn(3, 6), {"use_dora": True}),
}


def built(names, make, kind, settings):
    config = names.Config(init_lora_weights=False, **settings)
    torch.manual_seed(0)
    layer = getattr(names, kind)(make(), "default", config, r=2, lora_alpha=4)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(layer.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.rand_like(parameter))
    return layer


@pytest.mark.parametrize("case", BUILT)
def test_a_layer_built_by_hand_computes_and_merges_as_pefts(case):
    make, kind, x, settings = BUILT[case]
    real, ours = (built(names, make, kind, settings) for names in BOTH)
    plain = seeded(make)

    assert real.state_dict().keys() == ours.state_dict().keys()
    assert ours.active_adapters == real.active_adapters == ["default"]
    assert dict(ours.scaling) == dict(real.scaling) == {"default": 2.0}
    torch.testing.assert_close(ours(x), real(x))
    assert not torch.allclose(ours(x), plain(x))
    real.merge()
    ours.merge()
    torch.testing.assert_close(ours.get_base_layer().weight, real.get_base_layer().weight)
    ours.unmerge()
    torch.testing.assert_close(ours.get_base_layer().weight, plain.weight, rtol=0, atol=0)


def test_a_layer_begins_as_pefts_from_the_same_seed():
    layers = [
        seeded(names.Linear, nn.Linear(6, 5), "default", names.Config(), r=2, lora_alpha=4)
        for names in BOTH
    ]
    real, ours = (layer.lora_A["default"].weight for layer in layers)
    # The base is drawn from the same seed, before the seed is set again.
    torch.testing.assert_close(ours, real, rtol=0, atol=0)
    assert all(not layer.lora_B["default"].weight.any() for layer in layers)
    assert all(layer.lora_A["default"].weight.requires_grad for layer in layers)


def test_a_layer_in_half_precision_has_its_adapter_in_it_until_a_model_upcasts():
    base = nn.Linear(6, 5, dtype=torch.bfloat16)
    for names in BOTH:
        layer = names.Linear(base, "default", names.Config(), r=2, lora_alpha=4)
        assert layer.lora_A["default"].weight.dtype == torch.bfloat16


def test_more_adapters_are_added_switched_and_deleted_by_the_layer_itself():
    for names in BOTH:
        config = names.Config(init_lora_weights=False)
        layer = seeded(names.Linear, nn.Linear(6, 5), "one", config, r=2, lora_alpha=4)
        layer.update_layer("two", 3, lora_alpha=6, config=config)
        assert dict(layer.r) == {"one": 2, "two": 3}
        assert layer.active_adapters == ["one"]
        assert not layer.lora_A["two"].weight.requires_grad
        x = torch.randn(3, 6)
        first = layer(x)
        layer.set_adapter("two")
        assert layer.lora_A["two"].weight.requires_grad
        assert not layer.lora_A["one"].weight.requires_grad
        assert not torch.allclose(layer(x), first)
        with pytest.warns(UserWarning, match="Setting active adapter to one"):
            layer.delete_adapter("two")
        torch.testing.assert_close(layer(x), first)
        assert list(layer.r) == ["one"]


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_none_is_refused_as_by_peft(rank):
    for names in BOTH:
        with pytest.raises(ValueError, match="`r` should be a positive integer"):
            names.Linear(nn.Linear(6, 5), "default", names.Config(), r=rank, lora_alpha=4)


def test_a_layer_refuses_variants_that_it_lacks():
    for names in BOTH:
        config = names.Config(use_dora=True)
        with pytest.raises(ValueError, match="Invalid or unsupported variant combination"):
            names.LoraLayer(nn.Linear(6, 5)).resolve_lora_variant(config=config)
        with pytest.raises(ValueError):
            names.Embedding(nn.Embedding(6, 5), "a", names.Config(lora_bias=True), r=2)


def test_dispatch_finds_the_layer_or_none():
    for names in BOTH:
        made = names.dispatch_default(nn.Linear(6, 5), "a", names.Config(), r=2, lora_alpha=2)
        assert type(made) is names.Linear
        assert names.dispatch_default(nn.ReLU(), "a", names.Config(), r=2, lora_alpha=2) is None


# --- classes --------------------------------------------------------------------------------------


def test_native_layers_count_and_adapted_models_have_these_layers():
    native = lamina.get_peft_model(
        nn.ModuleDict({"lin": nn.Linear(4, 4)}), lamina.LoraConfig(target_modules=["lin"])
    )
    model = get_peft_model(
        nn.ModuleDict({"lin": nn.Linear(4, 4)}), LoraConfig(target_modules=["lin"])
    )

    assert isinstance(native.base_model.model["lin"], kinds.Linear)
    assert isinstance(native.base_model.model["lin"], kinds.LoraLayer)
    assert not isinstance(native.base_model.model["lin"], kinds.Embedding)
    assert type(model.base_model.model["lin"]) is kinds.Linear
    assert issubclass(kinds.Linear, kinds.LoraLayer)


def test_replaced_rows_are_no_lora_layer():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.lin = nn.Linear(4, 4)

    config = LoraConfig(target_modules=["lin"], trainable_token_indices={"table": [1]})
    model = get_peft_model(Text(), config).base_model.model

    assert not isinstance(model.table.token_adapter, kinds.LoraLayer)
    assert isinstance(model.lin, kinds.LoraLayer)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 3, 4))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.weight)


def filled(layer):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(layer.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.rand_like(parameter))
    return layer


def test_an_attention_built_by_hand_answers_as_pefts():
    x = torch.randn(3, 2, 4)
    layers = [
        filled(
            names.MultiheadAttention(
                seeded(nn.MultiheadAttention, 4, 2), "default", names.Config(), r=2, lora_alpha=4
            )
        )
        for names in BOTH
    ]
    real, ours = (layer(x, x, x)[0] for layer in layers)

    assert layers[0].state_dict().keys() >= layers[1].state_dict().keys()
    torch.testing.assert_close(ours, real)
    assert not torch.allclose(ours, seeded(nn.MultiheadAttention, 4, 2)(x, x, x)[0])


def test_a_parameter_wrapped_by_hand_answers_as_pefts():
    x = torch.randn(5, 4)
    real, ours = (
        filled(
            names.ParamWrapper(
                seeded(Experts),
                "default",
                parameter_name="weight",
                config=names.Config(),
                r=2,
                lora_alpha=4,
            )
        )
        for names in BOTH
    )

    torch.testing.assert_close(ours(x), real(x))
    assert not torch.allclose(ours(x), seeded(Experts)(x))
    for names in BOTH:
        with pytest.raises(ValueError, match="does not work with lora_dropout"):
            names.ParamWrapper(
                Experts(), "a", parameter_name="weight", config=names.Config(lora_dropout=0.1), r=2
            )
