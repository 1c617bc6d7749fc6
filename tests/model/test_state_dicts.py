"""Weights that come as a dict: they are copied, and what doesn't fit changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lamina.errors import FoldError, KeyMismatchError
from lamina.model import (
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tests import models
from tests.adapters import fill, flags, llama_adapter, llama_config, logits, same, weights


@pytest.mark.parametrize("way", ["inject", "set"])
def test_the_models_of_one_state_dict_share_no_memory(way: str) -> None:
    first = llama_adapter()
    tensors = get_peft_model_state_dict(first)
    second: Any
    if way == "inject":
        second = inject_adapter_in_model(llama_config(), models.tiny_llama(), state_dict=tensors)
    else:
        second = get_peft_model(models.tiny_llama(), llama_config(), low_cpu_mem_usage=True)
        set_peft_model_state_dict(second, tensors)
    before = logits(second)
    assert torch.equal(before, logits(first))
    fill(first, seed=9)
    assert torch.equal(logits(second), before)


def test_a_first_adapter_whose_weights_do_not_fit_is_not_injected() -> None:
    base = models.tiny_llama()
    before, asked = weights(base), flags(base)
    with pytest.raises(KeyMismatchError):
        inject_adapter_in_model(llama_config(), base, state_dict={"x": torch.zeros(1)})
    assert same(weights(base), before)
    assert flags(base) == asked


def test_a_second_adapter_whose_weights_do_not_fit_leaves_the_first() -> None:
    model = inject_adapter_in_model(llama_config(), models.tiny_llama(), "one")
    fill(model, "one")
    before, asked = weights(model), flags(model)
    wider = llama_config(target_modules=["q_proj", "up_proj"])
    with pytest.raises(KeyMismatchError):
        inject_adapter_in_model(wider, model, "two", state_dict={"x": torch.zeros(1)})
    assert same(weights(model), before)
    assert flags(model) == asked


def test_nothing_is_loaded_into_an_adapter_that_is_folded_in() -> None:
    model = llama_adapter(seed=1)
    tensors = get_peft_model_state_dict(llama_adapter(seed=2))
    model.merge_adapter()
    with pytest.raises(FoldError, match="folded"):
        set_peft_model_state_dict(model, tensors)
