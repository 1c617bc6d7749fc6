"""Layers and variants of one's own, derived from the drop-in's, against the same over peft."""

from __future__ import annotations

import math
import warnings
from types import MappingProxyType

import pytest
import torch
from torch import nn

from tests.parity.both import BOTH


class Scale(nn.Module):
    """`y = x * weight`: nothing that anybody adapts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return x * self.weight


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.scale = Scale()

    def forward(self, x):
        return self.scale(self.lin(x))


def scale_layer(names):  # noqa: C901
    """A layer that keeps its numbers, makes its weights, runs and merges by its own code."""

    class LoraScale(nn.Module, names.LoraLayer):
        adapter_layer_names = (*names.LoraLayer.adapter_layer_names, "lora_shift")

        def __init__(self, base_layer, adapter_name, config, r=0, lora_alpha=1, **kwargs):
            super().__init__()
            self.lora_shift = nn.ParameterDict()
            names.LoraLayer.__init__(self, base_layer, **kwargs)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

        def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
            self.r[adapter_name] = r
            self.lora_alpha[adapter_name] = lora_alpha
            self.scaling[adapter_name] = lora_alpha / math.sqrt(r)
            self.lora_dropout[adapter_name] = nn.Identity()
            self.lora_A[adapter_name] = nn.Linear(4, r, bias=False)
            self.lora_B[adapter_name] = nn.Linear(r, 1, bias=False)
            self.lora_shift[adapter_name] = nn.Parameter(torch.rand(4))
            self._move_adapter_to_device_of_base_layer(adapter_name)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

        def get_delta_weight(self, adapter):
            update = (self.lora_B[adapter].weight @ self.lora_A[adapter].weight)[0]
            return update * self.scaling[adapter] + self.lora_shift[adapter]

        def merge(self, safe_merge=False, adapter_names=None):
            for adapter in adapter_names or self.active_adapters:
                self.get_base_layer().weight.data += self.get_delta_weight(adapter)
                self.merged_adapters.append(adapter)

        def unmerge(self):
            while self.merged_adapters:
                adapter = self.merged_adapters.pop()
                self.get_base_layer().weight.data -= self.get_delta_weight(adapter)

        def forward(self, x):
            result = self.base_layer(x)
            if self.disable_adapters or self.merged:
                return result
            for adapter in self.active_adapters:
                if adapter in self.lora_A:
                    result = result + x * self.get_delta_weight(adapter)
            return result

    return LoraScale


def adapted(names, **settings):
    torch.manual_seed(0)
    config = names.Config(r=2, target_modules=["lin", "scale"], **settings)
    config._register_custom_module({Scale: scale_layer(names)})
    model = Net()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="Unsupported layer type .*Scale.* at your own risk"):
        return names.adapt(model, config)


def test_a_layer_of_ones_own_answers_trains_and_merges_as_over_peft():
    x = torch.randn(3, 4)
    real, ours = (adapted(names) for names in BOTH)

    assert ours.state_dict().keys() == real.state_dict().keys()
    # In which order the layers draw their weights is nobody's promise.
    ours.load_state_dict(real.state_dict())
    torch.testing.assert_close(ours(x), real(x))
    for model in (real, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
    trained = {n for n, p in real.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in ours.named_parameters() if p.requires_grad}
    assert any("lora_shift" in name for name in trained)
    torch.testing.assert_close(dict(ours.state_dict()), dict(real.state_dict()))
    answer = ours(x)
    with ours.disable_adapter():
        assert not torch.allclose(ours(x), answer)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), answer)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), answer)
    merged = [model.merge_and_unload() for model in (real, ours)]
    torch.testing.assert_close(merged[1].scale.weight, merged[0].scale.weight)
    torch.testing.assert_close(merged[1](x), answer)


def test_a_layer_of_ones_own_gets_a_second_adapter():
    x = torch.randn(3, 4)
    for names in BOTH:
        model = adapted(names)
        config = names.Config(r=3, target_modules=["scale"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter("other", config)
        layer = model.base_model.model.scale
        assert dict(layer.r) == {"default": 2, "other": 3}
        assert model.active_adapters == ["default"]
        before = model(x)
        model.set_adapter("other")
        assert not torch.allclose(model(x), before)
        model.set_adapter("default")
        model.delete_adapter("other")
        assert list(layer.lora_A) == ["default"]


def test_files_of_such_a_model_open_in_both(tmp_path):
    x = torch.randn(3, 4)
    for written, read in (BOTH, BOTH[::-1]):
        model = adapted(written)
        model.save_pretrained(tmp_path / "it")
        config = read.Config.from_pretrained(tmp_path / "it")
        config._register_custom_module({Scale: scale_layer(read)})
        torch.manual_seed(0)
        base = Net()
        with pytest.warns(UserWarning, match="Unsupported layer type"):
            loaded = read.Model.from_pretrained(base, tmp_path / "it", config=config)
        torch.testing.assert_close(loaded(x), model(x))


# --- a variant of one's own -----------------------------------------------------------------------


def gained_linear(names):
    """A linear layer whose DoRA is something else: the update times a gain for each output."""

    class Gain(names.LoraVariant):
        @staticmethod
        def init(module, adapter_name, **kwargs):
            if "lora_gain" not in module.adapter_layer_names:
                module.adapter_layer_names = (*module.adapter_layer_names, "lora_gain")
                module.lora_gain = nn.ParameterDict()
            module.lora_gain[adapter_name] = nn.Parameter(torch.full((4,), 0.5))

        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
            update = b(a(module.lora_dropout[active_adapter](x)))
            gain = module.lora_gain[active_adapter]
            return result + update * module.scaling[active_adapter] * gain

        @staticmethod
        def merge_safe(module, active_adapter, orig_weight):
            delta = module.get_delta_weight(active_adapter)
            return orig_weight + delta * module.lora_gain[active_adapter][:, None]

        @staticmethod
        def merge_unsafe(module, active_adapter, orig_weight):
            orig_weight.data = Gain.merge_safe(module, active_adapter, orig_weight.data)

        @staticmethod
        def unmerge(module, active_adapter, orig_weight):
            delta = module.get_delta_weight(active_adapter)
            return orig_weight - delta * module.lora_gain[active_adapter][:, None]

    class GainedLinear(names.Linear):
        @property
        def lora_variants(self):
            return {**super().lora_variants, ("use_dora",): Gain}

    return GainedLinear, Gain


def gained(names):
    torch.manual_seed(0)
    model = Net()
    config = names.Config(r=2, target_modules=["lin"], use_dora=True, init_lora_weights=False)
    kind, variant = gained_linear(names)
    config._register_custom_module({nn.Linear: kind})
    adapted = names.adapt(model, config)
    assert isinstance(adapted.base_model.model.lin.lora_variant["default"], variant)
    return adapted


def test_a_variant_of_ones_own_is_followed_as_by_peft(tmp_path):
    x = torch.randn(3, 4)
    real, ours = (gained(names) for names in BOTH)

    assert ours.state_dict().keys() == real.state_dict().keys()
    ours.load_state_dict(real.state_dict())
    torch.testing.assert_close(ours(x), real(x))
    for model in (real, ours):
        model(x).square().sum().backward()
    grads = [model.base_model.model.lin.lora_gain["default"].grad for model in (real, ours)]
    torch.testing.assert_close(grads[1], grads[0])
    merged = [model.merge_and_unload() for model in (real, ours)]
    torch.testing.assert_close(merged[1].lin.weight, merged[0].lin.weight)


def test_pefts_own_variants_can_be_derived_from():
    x = torch.randn(3, 6)
    outputs = []
    for names in BOTH:

        class Doubled(names.variants.DoraLinearVariant):
            @staticmethod
            def forward(module, active_adapter, x, result, _names=names, **kwargs):
                plain = _names.variants.DoraLinearVariant.forward(
                    module, active_adapter=active_adapter, x=x, result=result, **kwargs
                )
                return 2 * plain

        class Layer(names.Linear):
            lora_variants = MappingProxyType({("use_dora",): Doubled})

        torch.manual_seed(0)
        config = names.Config(use_dora=True, init_lora_weights=False)
        layer = Layer(nn.Linear(6, 5), "default", config, r=2, lora_alpha=4)
        assert isinstance(layer.lora_variant["default"], Doubled)
        torch.manual_seed(1)
        with torch.no_grad():
            for place in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                place["default"].weight.copy_(torch.rand_like(place["default"].weight))
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[1], outputs[0])
