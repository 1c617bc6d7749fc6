"""The promises about what goes wrong for people today, a short test each."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import peft
import pytest
import torch

from lamina.config import LoraConfig
from lamina.engine.targets import find_all_linear_names
from lamina.errors import (
    AlreadyAdaptedError,
    ConfigError,
    KeyMismatchError,
    PreflightError,
    TargetError,
    UnsupportedTargetError,
)
from lamina.model import PeftModel, check_gradients, get_peft_model, preflight
from tests import models
from tests.adapters import fill, llama_adapter, llama_config, logits, renamed, same, weights


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama_adapter().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning:peft")
def test_row_1_an_adapter_under_another_prefix_does_not_load_silently(saved: Path) -> None:
    renamed(saved, "base_model.model.model.", "base_model.model.model.language_model.")
    silent = peft.PeftModel.from_pretrained(models.tiny_llama(), saved)
    assert torch.equal(logits(silent), logits(models.tiny_llama()))

    with pytest.raises(KeyMismatchError) as caught:
        PeftModel.from_pretrained(models.tiny_llama(), saved)
    message = str(caught.value)
    assert "0 of 8 tensors matched" in message
    assert "file has prefix 'base_model.model.model.language_model.layers'" in message
    assert "the model has 'base_model.model.model.layers'" in message
    mapping = ast.literal_eval((caught.value.cure or "").partition("key_mapping=")[2])
    loaded = PeftModel.from_pretrained(models.tiny_llama(), saved, key_mapping=mapping)
    assert torch.equal(logits(loaded), logits(llama_adapter()))


def test_row_2_a_second_wrapping_neither_nests_nor_wipes() -> None:
    model = llama_adapter()
    before = logits(model)
    for given in (model, model.get_base_model()):
        with pytest.raises(AlreadyAdaptedError) as caught:
            get_peft_model(given, llama_config())
        assert [fault.split(":")[0] for fault in caught.value.faults] == [
            "continue",
            "stack",
            "merge",
        ]
    assert torch.equal(logits(model), before)


def test_row_3_training_that_learns_nothing_is_refused(saved: Path) -> None:
    model = PeftModel.from_pretrained(models.tiny_llama(), saved)
    with pytest.raises(PreflightError, match="0 trainable parameters"):
        preflight(model)
    model.add_adapter("second", llama_config())
    with pytest.raises(PreflightError, match="'second' is not active"):
        preflight(model)
    model.set_adapter(["default", "second"], train=["second"])
    preflight(model)
    with pytest.raises(PreflightError, match="8 adapter weights got no gradient"):
        check_gradients(model)
    model(input_ids=models.token_ids(), labels=models.token_ids()).loss.backward()
    check_gradients(model)


def test_row_5_a_frozen_first_and_a_trained_second(saved: Path) -> None:
    model = PeftModel.from_pretrained(models.tiny_llama(), saved, adapter_name="sft")
    model.add_adapter("dpo", LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    fill(model, "dpo", seed=4)
    model.set_adapter(["sft", "dpo"], train=["dpo"])
    both = logits(model)
    asked = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert asked == {"dpo"}
    model.set_adapter("sft")
    assert torch.equal(logits(model), logits(llama_adapter()))
    assert not torch.allclose(both, logits(model), atol=1e-3)


def test_row_7_combined_adapters_are_the_sum_or_say_how_far_they_are_from_it() -> None:
    model = llama_adapter(lora_alpha=6)
    model.add_adapter("other", llama_config(r=2, lora_alpha=8))
    fill(model, "other", seed=2)
    model.set_adapter(["default", "other"])
    wanted = logits(model)
    both = ["default", "other"], [1.0, 1.0]
    exact = model.add_weighted_adapter(*both, "exact", "cat")
    model.set_adapter("exact")
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    assert exact.exact

    begun = time.perf_counter()
    low = model.add_weighted_adapter(*both, "low", "svd", svd_rank=3)
    assert time.perf_counter() - begun < 1
    assert 0.01 < low.relative_error < 1

    model.add_adapter("alike", llama_config(lora_alpha=6))
    fill(model, "alike", seed=3)
    rough = model.add_weighted_adapter(["default", "alike"], [1.0, 1.0], "rough", "linear")
    # The cross terms: as much again as the sum itself.
    assert rough.relative_error > 0.5


def test_row_7_magnitudes_are_not_dropped() -> None:
    config = {"target_modules": ["up"], "r": 2, "use_dora": True}
    model = get_peft_model(models.perceptron(), LoraConfig(**config))
    fill(model)
    with pytest.raises(ConfigError, match="update is not scaling"):
        model.add_weighted_adapter(["default"], [1.0], "sum", "cat")
    x = torch.linspace(-1, 1, 16)[None]
    model.eval()
    wanted = model(x)
    assert model.add_weighted_adapter(["default"], [1.0], "sum", svd_rank=16).relative_error < 1e-5
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


def test_row_8_a_merged_weight_is_the_exact_sum_rounded_once() -> None:
    model = get_peft_model(models.tiny_llama().bfloat16(), llama_config())
    fill(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    a, b = (factor.double() for factor in layer.factors("default"))
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * b @ a
    merged = model.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, exact.bfloat16())

    model = llama_adapter()
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-6)


def test_row_9_a_thousand_merges_change_no_bit() -> None:
    model = get_peft_model(models.perceptron().bfloat16(), LoraConfig(target_modules=["up"]))
    fill(model)
    before = weights(model)
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    assert same(weights(model), before)

    theirs = peft.get_peft_model(
        models.perceptron().bfloat16(), peft.LoraConfig(target_modules=["up"])
    )
    theirs.load_state_dict(before)
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    drifted = theirs.get_base_model().up.base_layer.weight
    assert not torch.equal(drifted, before["base_model.model.up.base_layer.weight"])


def test_row_12_a_target_that_matches_nothing_is_refused() -> None:
    wanted = ["q_proj", "FAKE", "v_prj"]
    silent = peft.get_peft_model(models.tiny_llama(), peft.LoraConfig(target_modules=wanted))
    assert silent.get_nb_trainable_parameters()[0] > 0

    with pytest.raises(TargetError) as caught:
        get_peft_model(models.tiny_llama(), LoraConfig(target_modules=wanted))
    assert any("'FAKE' matched 0 modules" in fault for fault in caught.value.faults)
    assert any("'v_prj' matched 0 modules; nearest: 'v_proj'" in f for f in caught.value.faults)


def test_row_25_stage_two_targets_the_original_names(saved: Path) -> None:
    plain = find_all_linear_names(models.perceptron())
    model = get_peft_model(models.perceptron(), LoraConfig(target_modules=["up"]))
    assert find_all_linear_names(model) == plain == ["down", "up"]
    with pytest.raises(UnsupportedTargetError, match="lora_dropout"):
        model.add_adapter("second", LoraConfig(target_modules=["up", "drop"]))
    model.add_adapter("second", LoraConfig(target_modules=find_all_linear_names(model)))
    assert set(model.get_base_model().up.r) == {"default", "second"}
