"""Models that the real peft has adapted: named like plain ones, and never adapted over."""

from __future__ import annotations

import peft
import pytest
from torch import nn

import lamina
from tests import models


def adapted_by_peft() -> nn.Module:
    config = peft.LoraConfig(target_modules=["q_proj", "gate_proj"], modules_to_save=["lm_head"])
    return peft.get_peft_model(models.tiny_llama(), config)


def test_linear_names_are_the_original_ones() -> None:
    plain = lamina.find_all_linear_names(models.tiny_llama())
    assert lamina.find_all_linear_names(adapted_by_peft()) == plain
    assert lamina.find_all_linear_names(adapted_by_peft().base_model.model) == plain


def test_a_second_adapter_is_refused_and_the_first_survives() -> None:
    model = adapted_by_peft()
    before = {name: id(module) for name, module in model.named_modules()}
    config = lamina.LoraConfig(target_modules=["q_proj"])
    for begin in (
        lambda: lamina.get_peft_model(model, config),
        lambda: lamina.get_peft_model(model.base_model.model, config),
        lambda: lamina.inject_adapter_in_model(config, model.base_model.model, "second"),
        lambda: lamina.begin_stage(model, name="second", config=config),
    ):
        with pytest.raises(lamina.AlreadyAdaptedError, match="'default'"):
            begin()
    assert {name: id(module) for name, module in model.named_modules()} == before
