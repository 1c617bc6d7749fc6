"""Fused experts: vLLM's and PEFT's files are the same; other programs don't take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lamina.stages.export import check_export, export
from tests.checkpoint.export import made

EXPERTS, RANK = 3, 2
OWNER = f"{made.PREFIX}model.layers.0.mlp.experts"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tensors = {
        f"{OWNER}.lora_A.weight": made.values(RANK * EXPERTS, made.HIDDEN, seed=1),
        f"{OWNER}.lora_B.weight": made.values(24, RANK * EXPERTS, seed=2),
        f"{OWNER}.base_layer.lora_A.weight": made.values(RANK * EXPERTS, 24, seed=3),
        f"{OWNER}.base_layer.lora_B.weight": made.values(made.HIDDEN, RANK * EXPERTS, seed=4),
    }
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 6,
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    return made.write(tmp_path / "a", tensors, config)


def test_they_go_to_vllm_bit_for_bit(adapter: Path, tmp_path: Path) -> None:
    report = export(adapter, tmp_path / "out", target="vllm")
    assert "experts" in report.notes[0].what
    before, after = (
        load_file(x / "adapter_model.safetensors") for x in (adapter, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # Each expert's own rank, which is also what the server's limit is compared with.
    assert (config["r"], config["lora_alpha"]) == (RANK, 6)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert len(config["target_parameters"]) == 2
    # What vLLM can't do without.
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()


@pytest.mark.parametrize("target", ["gguf", "mlx"])
def test_other_programs_are_told_to_take_the_whole_model(
    adapter: Path, tmp_path: Path, target: str
) -> None:
    base = made.base_config(tmp_path / "base")
    (fault, *_) = check_export(adapter, target=target, base=base).faults
    assert "experts" in fault.what
    assert "lamina merge" in fault.cure
