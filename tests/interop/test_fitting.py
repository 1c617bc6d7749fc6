"""What of a config's parameters matches nothing, said as peft says it."""

from __future__ import annotations

import pytest
from torch import nn

from lamina.interop.peft.adapting import get_peft_model
from lamina.interop.peft.lora_config import LoraConfig
from lamina.interop.peft.types import NoMatchingPeftModuleError
from tests import models


@pytest.mark.parametrize("targets", [None, [], ""])
def test_neither_a_module_nor_a_parameter_is_refused(targets: object) -> None:
    config = LoraConfig(target_modules=targets, target_parameters=["absent.weight"])
    with pytest.raises(NoMatchingPeftModuleError, match="also no `target_parameters` found"):
        get_peft_model(models.perceptron(), config)


def test_modules_without_the_parameters_are_adapted_with_a_warning() -> None:
    config = LoraConfig(target_modules=["up"], target_parameters=["absent.weight"])
    with pytest.warns(RuntimeWarning, match="were set but no parameter was matched"):
        model = get_peft_model(models.perceptron(), config)
    assert model.targeted_module_names == ["up"]


def test_a_layer_and_its_weight_are_not_both_adapted() -> None:
    base = models.perceptron()
    config = LoraConfig(target_modules=["up"], target_parameters=["up.weight"])
    with pytest.raises(ValueError, match="of layer 'up' of type Linear, which is not a valid"):
        get_peft_model(base, config)
    assert type(base.up) is nn.Linear
