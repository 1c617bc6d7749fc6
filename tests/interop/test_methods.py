"""Methods other than LoRA: their names are there, using them is one clear error."""

from __future__ import annotations

import pytest
from torch import nn

from lamina.errors import LaminaError
from lamina.interop.peft.adapting import get_peft_model
from lamina.interop.peft.config import PeftConfig, PromptLearningConfig
from lamina.interop.peft.injecting import inject_adapter_in_model
from lamina.interop.peft.modules import resolve
from lamina.interop.peft.tuner import BaseTuner, BaseTunerLayer


def test_classes_have_the_bases_that_libraries_ask_for():
    assert issubclass(resolve("peft", "IA3Config"), PeftConfig)
    assert issubclass(resolve("peft", "PrefixTuningConfig"), PromptLearningConfig)
    assert issubclass(resolve("peft", "IA3Model"), BaseTuner)
    assert issubclass(resolve("peft.tuners.ia3", "IA3Layer"), BaseTunerLayer)
    assert not isinstance(nn.Linear(1, 1), resolve("peft.tuners.loha.layer", "LoHaLayer"))


def test_choices_have_members():
    kind = resolve("peft", "PromptTuningInit")

    assert kind.TEXT == "TEXT"


@pytest.mark.parametrize("apply", [get_peft_model, lambda m, c: inject_adapter_in_model(c, m)])
def test_a_config_can_be_held_but_not_applied(apply):
    model = nn.Sequential(nn.Linear(2, 2))
    config = resolve("peft", "LoHaConfig")(r=4, target_modules=["0"])
    assert (config.r, config.peft_type) == (4, "LOHA")

    with pytest.raises(LaminaError, match=r"LoRA only(.|\n)*uninstall"):
        apply(model, config)
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("peft", "IA3Model"),
        ("peft.tuners.vera", "VeraLayer"),
        ("peft", "compose_cartridge_adapters"),
    ],
)
def test_models_layers_and_functions_are_refused(module, name):
    with pytest.raises(LaminaError, match=f"{name}.*LoRA only"):
        resolve(module, name)(nn.Linear(1, 1))
