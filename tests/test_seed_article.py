"""What a reader of the article on several LoRA stages does, row by row, as a script would do it.

Beside each of Lamina's answers stands what the real peft does with the same lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.targets import find_all_linear_names
from lamina.errors import AlreadyAdaptedError, PreflightError, UnsupportedTargetError
from lamina.model import PeftModel, get_peft_model, preflight
from tests import models
from tests.adapters import fill, llama_adapter, logits, same, trained, weights

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
TARGETS = ["q_proj", "v_proj"]


def batch() -> dict[str, torch.Tensor]:
    ids = models.token_ids()
    return {"input_ids": ids, "labels": ids}


def learn(model: Any, steps: int = 2) -> set[str]:
    """Train as scripts do, and say which parameters have changed."""
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {n for n, tensor in weights(model).items() if not torch.equal(tensor, before[n])}


@pytest.fixture
def stage_one(tmp_path: Path) -> Path:
    """The directory of a first stage that has been trained."""
    llama_adapter(target_modules=TARGETS).save_pretrained(tmp_path / "stage1")
    return tmp_path / "stage1"


# --- get_peft_model on a model that has adapters --------------------------------------------------


def test_a_second_wrapping_is_refused_with_the_three_ways_on(stage_one: Path) -> None:
    model = PeftModel.from_pretrained(models.tiny_llama(), stage_one)
    before = weights(model)
    with pytest.raises(AlreadyAdaptedError) as caught:
        get_peft_model(model, LoraConfig(target_modules=TARGETS))
    message = str(caught.value)
    assert "'default'" in message
    for mode in ("continue", "stack", "merge"):
        assert f'lamina.begin_stage(base, name="next", parent=DIR, mode="{mode}"' in message
    assert 'model.add_adapter("next", config)' in message
    assert same(weights(model), before)


# What peft warns of is not what is tested.
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_peft_wipes_the_first_stage_and_loses_the_second(stage_one: Path, tmp_path: Path) -> None:
    base = logits(models.tiny_llama())
    model = peft.PeftModel.from_pretrained(models.tiny_llama(), stage_one)
    assert not torch.equal(logits(model), base)
    nested = peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS))
    assert torch.equal(logits(nested), base)
    learn(nested)
    assert not torch.equal(logits(nested), base)
    nested.save_pretrained(tmp_path / "stage2")
    saved = load_file(tmp_path / "stage2" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.base_model.model.") for key in saved)
    again = peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "stage2")
    assert torch.equal(logits(again), base)


# --- target_modules names a Dropout ---------------------------------------------------------------


@pytest.mark.parametrize("target", ["drop", "act"])
def test_a_target_without_weights_is_explained(target: str) -> None:
    base = models.perceptron()
    before = weights(base)
    with pytest.raises(UnsupportedTargetError) as caught:
        get_peft_model(base, LoraConfig(target_modules=["up", target]))
    message = str(caught.value)
    assert f"{target} (" in message
    assert f"hit by '{target}'" in message
    assert "no weights to adapt" in message
    assert ("lora_dropout" in message) == (target == "drop")
    assert "['down', 'up']" in message
    assert same(weights(base), before)


def test_peft_says_only_that_it_is_not_supported() -> None:
    with pytest.raises(ValueError, match=r"Target module Dropout\(p=0.1") as caught:
        peft.get_peft_model(models.perceptron(), peft.LoraConfig(target_modules=["up", "drop"]))
    assert "lora_dropout" not in str(caught.value)


# --- target_modules=find_all_linear_names(adapted_model) ------------------------------------------


def test_the_linear_names_of_an_adapted_model_are_the_original_ones(stage_one: Path) -> None:
    assert find_all_linear_names(models.tiny_llama()) == LINEAR
    model = PeftModel.from_pretrained(models.tiny_llama(), stage_one)
    names = find_all_linear_names(model)
    assert names == LINEAR
    before = logits(model)
    model.add_adapter("second", LoraConfig(target_modules=names))
    model.set_adapter(["default", "second"], train=["second"])
    assert torch.equal(logits(model), before)
    assert len(trained(model)) == 2 * len(LINEAR) * 2
    assert not any(".base_layer.lora_" in name for name in trained(model))


def copied_from_articles(model: nn.Module) -> list[str]:
    """The helper that articles hand around."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sorted({name.split(".")[-1] for name in linear} - {"lm_head"})


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_the_copied_helper_names_the_adapters_internals(stage_one: Path) -> None:
    model = peft.PeftModel.from_pretrained(models.tiny_llama(), stage_one)
    names = copied_from_articles(model)
    assert {"default", "base_layer"} <= set(names)
    assert not {"q_proj", "v_proj"} & set(names)
    with pytest.raises(ValueError, match="not found in the base model") as caught:
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["default", "base_layer"]))
    assert not any(name in str(caught.value) for name in LINEAR)


# --- PeftModel.from_pretrained(base, dir) and then trains -----------------------------------------


def test_a_loaded_adapter_that_would_not_train_is_told_beforehand(
    stage_one: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = PeftModel.from_pretrained(models.tiny_llama(), stage_one)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert printed.startswith("trainable params: 0 ||")
    assert "'default' is frozen" in printed
    assert "is_trainable=True" in printed
    with pytest.raises(PreflightError) as caught:
        preflight(model)
    assert "is_trainable=True" in (caught.value.cure or "")


def test_peft_trains_nothing_and_says_nothing(stage_one: Path) -> None:
    model = peft.PeftModel.from_pretrained(models.tiny_llama(), stage_one)
    # As trainers do for checkpointing: the loss has a gradient then, so that nothing fails.
    model.enable_input_require_grads()
    assert learn(model) == set()


# --- PeftModel.from_pretrained(base, dir, is_trainable=True) --------------------------------------


def test_a_trainable_load_trains_exactly_that_adapter(stage_one: Path) -> None:
    model = PeftModel.from_pretrained(models.tiny_llama(), stage_one, is_trainable=True)
    preflight(model)
    assert torch.equal(logits(model), logits(llama_adapter()))
    changed = learn(model)
    assert changed == trained(model)
    assert len(changed) == 8
    assert all(".lora_" in name for name in changed)


# --- from_pretrained, add_adapter, set_adapter([...], train=[...]) --------------------------------


def test_the_first_is_frozen_the_second_trains_and_both_contribute(stage_one: Path) -> None:
    model = PeftModel.from_pretrained(models.tiny_llama(), stage_one)
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=[*TARGETS, "up_proj"]))
    model.set_adapter(["default", "second"], train=["second"])
    preflight(model)
    # B is zero: until the second learns, the model is the first stage's.
    assert torch.equal(logits(model), first)
    changed = learn(model)
    assert changed == trained(model)
    assert {name.split(".")[-2] for name in changed} == {"second"}
    both = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not torch.allclose(both, first, atol=1e-4)
    assert not torch.allclose(both, second, atol=1e-4)


def test_peft_drops_the_first_or_trains_it_along(stage_one: Path) -> None:
    model = peft.PeftModel.from_pretrained(models.tiny_llama(), stage_one)
    first = logits(model)
    model.add_adapter("second", peft.LoraConfig(target_modules=TARGETS))
    model.set_adapter("second")
    # Stage 2 would start from the bare base.
    assert torch.equal(logits(model), logits(models.tiny_llama()))
    model.base_model.set_adapter(["default", "second"])
    assert torch.equal(logits(model), first)
    assert {name.split(".")[-2] for name in learn(model)} == {"default", "second"}


# --- lora_dropout on the adapted model ------------------------------------------------------------


def test_lora_dropout_acts_on_the_branch_in_training_only() -> None:
    base = models.perceptron()
    model = get_peft_model(base, LoraConfig(target_modules=["up"], lora_dropout=0.5))
    fill(model)
    dropouts = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout)]
    assert sorted(dropouts) == ["base_model.model.drop", "base_model.model.up.lora_dropout.default"]
    assert base.drop.p == 0.1
    x = torch.randn(64, 16)
    layer = base.up
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    model.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ a.T @ b.T)
    model.train()
    torch.manual_seed(5)
    update = layer(x) - layer.base_layer(x)
    torch.manual_seed(5)
    kept = nn.functional.dropout(x, 0.5)
    assert 0.3 < (kept == 0).float().mean() < 0.7
    torch.testing.assert_close(update, kept @ a.T @ b.T, rtol=1e-5, atol=1e-5)
