"""What `lamina inspect` and `lamina targets` say of adapters that are more than plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.config import AdaLoraConfig, KasaConfig, LoraConfig, MontecloraConfig
from tests import models
from tests.adapters import fill, llama_config
from tests.cli.made import lamina as cli
from tests.parity.kinds import KINDS

MAGNITUDES = 2 * (32 + 16)
SAID: list[tuple[LoraConfig, str]] = [
    (llama_config(), "method LoRA scaling 2"),
    (llama_config(use_dora=True), f"method DoRA; magnitudes of 4 modules, {MAGNITUDES} parameters"),
    (llama_config(use_rslora=True), "method rsLoRA scaling 4"),
    (llama_config(lora_bias=True), f"method LoRA; biases of B of 4 modules, {MAGNITUDES} param"),
    (llama_config(trainable_token_indices=[3, 9]), "method LoRA; replaced rows of 1 module, 64 p"),
    (llama_config(alora_invocation_tokens=[5]), "method aLoRA scaling"),
    (llama_config(kasa_config=KasaConfig()), "method KaSA; diagonals of 4 modules, 16 parameters"),
    (
        llama_config(monteclora_config=MontecloraConfig(num_samples=2)),
        "method MonteCLoRA; samplers of 4 modules",
    ),
    (
        AdaLoraConfig(total_step=9, init_r=6, target_modules=["q_proj"], lora_alpha=12),
        "method AdaLoRA; singular values of 2 modules, 12 parameters scaling 2",
    ),
]


def said(*arguments: Any) -> str:
    return " ".join(cli(*map(str, arguments)).stdout.split())


@pytest.mark.filterwarnings("ignore:aLoRA")
@pytest.mark.parametrize(("config", "line"), SAID, ids=[line.split()[1] for _, line in SAID])
def test_a_method_and_its_own_tensors_are_told(
    config: LoraConfig, line: str, tmp_path: Path
) -> None:
    model = lamina.get_peft_model(models.tiny_llama(), config)
    fill(model)
    model.save_pretrained(tmp_path)
    assert line in said("inspect", tmp_path)


def test_parameters_of_experts_have_the_scaling_of_each_expert(tmp_path: Path) -> None:
    kind = KINDS["Mixtral"]
    config = LoraConfig(**kind.adapter, r=2, lora_alpha=3)
    model = lamina.get_peft_model(kind.make(), config)
    fill(model)
    model.save_pretrained(tmp_path)
    text = said("inspect", tmp_path)
    assert "parameters experts.gate_up_proj, experts.down_proj scaling 1.5 " in text
    # Three experts of rank 2 each, in two layers with two parameters each.
    assert "experts 4 6 48 → 32, 32 → 96" in text
    assert "base_layer" not in text


def test_targets_tells_of_experts_and_takes_them_in(tmp_path: Path) -> None:
    KINDS["Mixtral"].make().save_pretrained(tmp_path)
    text = said("targets", tmp_path)
    assert "all-linear 8 " in text
    assert "experts left out experts.down_proj, experts.gate_up_proj" in text
    text = said("targets", tmp_path, "--parameter", "experts.down_proj", "--r", "2")
    assert "model.layers.*.mlp.experts.down_proj 2 MixtralExperts 48 → 32 960" in text
    assert "experts left out" not in text
