"""Conversions to LoRA, and intruder dimensions, against the real peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension as theirs_reduce
from torch import Tensor, nn

import lamina
from lamina.errors import ConversionError
from lamina.model.conversion import convert_to_lora, save_as_lora, supports_lora_conversion
from lamina.model.intruders import reduce_intruder_dimension
from tests import models
from tests.parity.pairs import assert_close, pair

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
IDS = models.token_ids()


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: tensors[key.replace("lora_A", "lora_B")] @ a
        for key, a in tensors.items()
        if "lora_A" in key
    }


def lokr(make: Any = models.tiny_llama, **config: Any) -> nn.Module:
    settings = {"target_modules": ["q_proj", "up_proj"], "init_weights": False, **config}
    with models.seeded(3):
        return peft.get_peft_model(make(), peft.LoKrConfig(**settings)).eval()


@pytest.mark.parametrize("rank", [3, 0.7, 1.0])
def test_another_method_is_converted_alike(rank: int | float) -> None:
    model = lokr()
    config, tensors = convert_to_lora(model, rank)
    other_config, other = peft.convert_to_lora(model, rank)
    assert tensors.keys() == other.keys()
    for key, update in products(other).items():
        assert_close(products(tensors)[key], update, 1e-5)
    assert config.rank_pattern == other_config.rank_pattern
    assert config.alpha_pattern == other_config.alpha_pattern
    assert (config.r, config.lora_alpha) == (other_config.r, other_config.lora_alpha)
    assert set(config.target_modules) <= set(other_config.target_modules)


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already")
def test_a_stored_transposed_weight_is_converted_alike() -> None:
    ours, theirs = pair(models.tiny_gpt2, target_modules=["c_attn"], r=6, lora_alpha=4)
    wanted = products(peft.convert_to_lora(theirs, 4)[1])
    for model in (ours, theirs):
        for key, update in products(convert_to_lora(model, 4)[1]).items():
            assert_close(update, wanted[key], 1e-5)


def test_a_saved_conversion_opens_in_both(tmp_path: Path) -> None:
    model = lokr(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    save_as_lora(tmp_path, model, rank=32)
    wanted = model(input_ids=IDS).logits
    for library in (lamina, peft):
        loaded = library.PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
        torch.testing.assert_close(loaded(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already")
def test_lora_of_one_rank_becomes_one_of_another_alike() -> None:
    config = {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 3}
    ours, theirs = pair(models.tiny_llama, **config)
    for rank in (4, 0.8):
        mine, other = convert_to_lora(ours, rank)[1], peft.convert_to_lora(theirs, rank)[1]
        assert mine.keys() == other.keys()
        for key, update in products(other).items():
            assert_close(products(mine)[key], update, 1e-5)


def test_what_can_be_converted_is_told_alike() -> None:
    ia3 = peft.get_peft_model(
        models.perceptron(), peft.IA3Config(target_modules=["up"], feedforward_modules=[])
    )
    for model in (lokr(), ia3, models.perceptron()):
        expected = getattr(model, "supports_lora_conversion", lambda: False)()
        assert supports_lora_conversion(model) is expected
    with pytest.raises(ConversionError, match="do not support LoRA conversion"):
        convert_to_lora(ia3, 2)
    with pytest.raises(TypeError, match="Could not detect any layer"):
        convert_to_lora(models.perceptron(), 2)


@pytest.mark.parametrize("rank", [0, -1, -0.5, 123.0, 33])
def test_wrong_ranks_are_refused_alike(rank: int | float) -> None:
    model = lokr()
    for library in (lamina.model.conversion, peft):
        if rank != -1:  # peft converts to something.
            with pytest.raises(ValueError, match="rank"):
                library.convert_to_lora(model, rank)
    with pytest.raises(ConversionError):
        convert_to_lora(model, rank)


# --- intruders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 0.7, 999])
def test_intruders_are_reduced_alike(epsilon: float) -> None:
    ours, theirs = pair(models.tiny_llama, target_modules=["q_proj", "v_proj"], r=4, lora_alpha=6)
    told: tuple[list[str], list[str]] = ([], [])
    how = {"threshold_epsilon": epsilon, "top_k": 5, "mitigation_lambda": 0.4}
    reduce_intruder_dimension(ours, logging_sink=told[0].append, **how)
    theirs_reduce(theirs, logging_sink=told[1].append, **how)
    assert [line.split(": ", 1)[-1] for line in told[0]] == [
        line.split(": ", 1)[-1] for line in told[1]
    ]
    assert ours.active_adapters == theirs.active_adapters == ["intruder_reduced"]
    assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, 1e-4)
    ours.set_adapter("default")
    theirs.set_adapter("default")
    assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


@pytest.mark.parametrize("target", ["wte", "c_attn"])
def test_peft_mixes_up_a_and_b_where_weights_are_transposed_and_lamina_does_not(
    target: str,
) -> None:
    """Of full mitigation of all there is, nothing of base and update may be left."""
    ours, theirs = pair(models.tiny_gpt2, target_modules=[target], r=2)
    how: dict[str, Any] = {"threshold_epsilon": 999, "top_k": 1, "logging_sink": None}
    layer = next(layer for _, layer in lamina.engine.layers.lora_layers(ours))
    whole = layer.weight + layer.get_delta_weight("default")
    u, s, vh = torch.linalg.svd(whole)
    wanted = layer.get_delta_weight("default") - 0.25 * s[0] * torch.outer(u[:, 0], vh[0])
    u, s, vh = torch.linalg.svd(wanted)
    reduce_intruder_dimension(ours, **how)
    assert_close(layer.get_delta_weight("intruder_reduced"), u[:, :2] * s[:2] @ vh[:2], 1e-4)
    theirs_reduce(theirs, **how)
    with pytest.raises((RuntimeError, IndexError)):
        theirs(input_ids=IDS)
