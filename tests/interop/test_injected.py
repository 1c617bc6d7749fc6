"""Models without a facade, whose adapters are deleted layer by layer, as diffusers does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lamina.interop.peft.injecting import inject_adapter_in_model
from lamina.interop.peft.lora_config import LoraConfig
from lamina.interop.peft.tuner import BaseTunerLayer

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


def model(*names: str) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    for name in names:
        config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        inject_adapter_in_model(config, made, name)
    return made


def layers(of: nn.Module) -> list[nn.Module]:
    return [module for module in of.modules() if isinstance(module, BaseTunerLayer)]


def delete(of: nn.Module, name: str) -> None:
    for layer in layers(of):
        layer.delete_adapter(name)
    of.peft_config.pop(name)


def test_the_first_that_is_left_takes_over_and_trains() -> None:
    x = torch.randn(3, 4)
    made, alone = model("one", "two"), model("one")
    with pytest.warns(UserWarning, match="two was active which is now deleted.*adapter to one"):
        delete(made, "two")
    assert [layer.active_adapter for layer in layers(made)] == [["one"], ["one"]]
    torch.testing.assert_close(made(x), alone(x))
    asked = {name for name, p in made.named_parameters() if p.requires_grad}
    assert {name for name in asked if ".one." in name} == {
        f"{i}.lora_{k}.one.weight" for i in (0, 2) for k in "AB"
    }


def test_what_is_not_active_goes_quietly_and_its_name_is_free() -> None:
    made = model("one", "two")
    delete(made, "one")
    assert [layer.active_adapters for layer in layers(made)] == [["two"], ["two"]]
    delete(made, "two")
    assert made.peft_config == {}
    torch.testing.assert_close(made(torch.ones(1, 4)), model()(torch.ones(1, 4)))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    inject_adapter_in_model(config, made, "two")
    assert list(made.peft_config) == ["two"]


def test_a_copy_has_configs_of_its_own() -> None:
    made = model("one", "two")
    other = copy.deepcopy(made)
    delete(made, "one")
    assert list(other.peft_config) == ["one", "two"]
    delete(other, "one")
    assert [layer.active_adapters for layer in layers(other)] == [["two"], ["two"]]
