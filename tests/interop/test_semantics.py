"""Where the drop-in does as peft does, and native Lamina otherwise."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lamina
from lamina.interop.peft.adapting import get_peft_model
from lamina.interop.peft.config import PeftConfig
from lamina.interop.peft.facade import PeftModel
from lamina.interop.peft.injecting import inject_adapter_in_model
from lamina.interop.peft.lora_config import LoraConfig
from lamina.interop.peft.mixed import PeftMixedModel
from lamina.interop.peft.tuner import BaseTuner, BaseTunerLayer
from lamina.interop.peft.types import NoMatchingPeftModuleError


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


def config(*targets, **more):
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **more)


def grads(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_native_models_count_as_peft_models():
    model = lamina.get_peft_model(base(), lamina.LoraConfig(target_modules=["0"]))

    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model, BaseTuner)
    assert isinstance(model.base_model.model[0], BaseTunerLayer)
    assert isinstance(model.peft_config["default"], PeftConfig)
    assert not isinstance(base(), PeftModel)
    assert not isinstance(model, PeftMixedModel)


def test_some_targets_have_to_match_not_all():
    model = get_peft_model(base(), config("0", "nothing"))

    assert model.base_model.targeted_module_names == ["0"]
    with pytest.raises(NoMatchingPeftModuleError, match="not found in the base model"):
        get_peft_model(base(), config("nothing"))


def test_a_second_wrapping_warns_and_the_first_adapter_is_kept():
    model = base()
    first = get_peft_model(model, config("0"))

    with pytest.warns(UserWarning, match="second time|Already found"):
        get_peft_model(model, config("2"), adapter_name="other")
    assert set(first.peft_config) == {"default", "other"}


def test_activating_trains_the_named_adapter_and_no_other():
    model = get_peft_model(base(), config("0"))
    model.add_adapter("other", config("0"))
    assert grads(model) == {f"base_model.model.0.lora_{k}.default.weight" for k in "AB"}

    model.set_adapter("other")
    assert grads(model) == {f"base_model.model.0.lora_{k}.other.weight" for k in "AB"}
    model.set_adapter("other", inference_mode=True)
    assert grads(model) == set()
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("nobody")


def test_loading_over_an_adapter_replaces_its_weights(tmp_path):
    x = torch.randn(3, 4)
    saved = get_peft_model(base(), config("0", "2"))
    saved.save_pretrained(tmp_path)
    model = get_peft_model(base(), config("0", "2"))
    model.base_model.model[0].initialise("default", False)
    assert not torch.allclose(model(x), saved(x))

    result = model.load_adapter(tmp_path, "default")

    assert result.missing_keys == [] == result.unexpected_keys
    torch.testing.assert_close(model(x), saved(x))


def test_missing_tensors_warn_by_their_names_in_the_model(tmp_path):
    get_peft_model(base(), config("0")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "target_modules": ["0", "2"]}))

    with pytest.warns(UserWarning, match=r"missing adapter keys.*model\.2\.lora_A\.default"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_unknown_fields_of_a_file_warn(tmp_path):
    config("0").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "spam": 1}))

    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['spam'\]"):
        found = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(found, LoraConfig)
    assert found.r == 2


def test_a_saved_adapter_opens_natively(tmp_path):
    x = torch.randn(3, 4)
    model = get_peft_model(base(), config("0"))
    model.save_pretrained(tmp_path)

    native = lamina.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(native(x), model(x))
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


def test_injecting_activates_the_new_adapter_only():
    x = torch.randn(3, 4)
    model = inject_adapter_in_model(config("0"), base(), "one")
    alone = get_peft_model(base(), config("0"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config("0"), model, "two")
    layer = model[0]
    a, b = layer.factors("two")
    scaling = layer.scaling["two"]

    hidden = base()[0](x) + scaling * x @ a.T @ b.T
    torch.testing.assert_close(model(x), base()[2](torch.relu(hidden)))
    assert list(layer.active_adapters) == ["two"]
    assert alone.active_adapter == "default"


def test_names_of_tensors_choose_the_modules():
    wanted = {"base_model.model.2.lora_A.weight": torch.zeros(2, 6)}

    with pytest.warns(RuntimeWarning, match="inconsistency was discovered"):
        model = inject_adapter_in_model(config("0"), base(), state_dict=wanted)
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[2], BaseTunerLayer)


def test_mixed_models_activate_several_adapters_and_are_not_saved(tmp_path):
    x = torch.randn(3, 4)
    model = get_peft_model(base(), config("0"), mixed=True)
    model.add_adapter("other", config("2"))
    alone = model(x)
    model.set_adapter(["default", "other"])

    assert isinstance(model, PeftMixedModel)
    assert not torch.allclose(model(x), alone)
    with pytest.raises(NotImplementedError):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "more", [{"modules_to_save": ["mine"]}, {"trainable_token_indices": {"mine": [0]}}]
)
def test_what_names_the_adapter_itself_is_refused(more):
    model = base()

    with pytest.raises(ValueError, match=r"child of <class 'peft.tuners.lora.layer.Linear'>"):
        get_peft_model(model, config("0", **more), adapter_name="mine")
    assert isinstance(model[0], nn.Linear)


def test_a_replaced_state_dict_says_what_is_saved(tmp_path):
    model = get_peft_model(base(), config("0", "2"))
    tensors = model.state_dict()
    del tensors["base_model.model.2.lora_A.default.weight"]
    model.state_dict = lambda: tensors

    model.save_pretrained(tmp_path)

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition("model.")[2] for name in saved} == {
        "0.lora_A.weight",
        "0.lora_B.weight",
        "2.lora_B.weight",
    }


def test_a_second_copy_of_a_module_begins_as_the_base_has_it():
    model = get_peft_model(base(), config("0", modules_to_save=["2"]), "one")
    wrapper = model.base_model.model[2]
    with torch.no_grad():
        wrapper.modules_to_save["one"].weight.add_(1)
    model.add_adapter("two", config("0", modules_to_save=["2"]))

    assert torch.equal(wrapper.modules_to_save["two"].weight, base()[2].weight)
