"""What goes wrong elsewhere when an adapter is to be served, and what happens here instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from lamina.checkpoint.export.vllm_ranks import VLLM_DEFAULT_RANK
from lamina.errors import ExportError
from lamina.stages.export import check_export, export
from tests import models
from tests.checkpoint.export import made
from tests.stages.chains import config_of, deltas_in, llama_lora, run_chain

SFT = llama_lora(r=12, lora_alpha=24)
DPO = llama_lora(r=10, lora_alpha=15, target_modules=["v_proj", "o_proj"])


def served(folder: Path) -> dict[str, made.Array]:
    """What a vLLM of 2025 computes: one alpha / r for all modules, whatever patterns say."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scaling
        * (tensors[key.replace("lora_A", "lora_B")].double().numpy() @ a.double().numpy())
        for key, a in tensors.items()
        if "lora_A" in key
    }


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_chain(tmp_path_factory.mktemp("run"), [("sft", None, SFT), ("dpo", "stack", DPO)])[1]


# --- row 6: a stack of adapters can't be served ---------------------------------------------------


def test_a_stage_on_a_stage_is_one_adapter_for_the_server(chain: Path) -> None:
    config = config_of(chain)
    assert config["lora_alpha"] / config["r"] == 1.5
    # The last stage's directory alone, read as the server reads it, is the whole chain.
    found, v_proj = served(chain), "model.layers.0.self_attn.v_proj"
    sft = served(chain.parent / "sft")[v_proj]
    own = deltas_in(chain)[v_proj]
    assert made.off(found[v_proj], own) < 1e-6
    assert np.linalg.matrix_rank(found[v_proj] - sft, tol=1e-4) == DPO.r


def test_a_chain_over_the_servers_limit_is_told_with_both_ways_out(chain: Path) -> None:
    (fault,) = check_export(chain, target="vllm").faults
    assert f"rank 22 is over --max-lora-rank {VLLM_DEFAULT_RANK}" in fault.what
    assert "--max-lora-rank 32" in fault.cure
    assert "--rank 16" in fault.cure


def test_exactly_with_a_larger_limit_or_compressed_with_the_error(
    chain: Path, tmp_path: Path
) -> None:
    base = models.tiny_llama()
    exact = export(chain, tmp_path / "exact", target="vllm", max_rank=32, base=base)
    assert exact.compression is None
    assert exact.difference == 0
    assert exact.probe is not None
    assert exact.probe.max_difference < 1e-6
    small = export(chain, tmp_path / "small", target="vllm", rank=8, base=base)
    assert small.rank == (8, 8)
    before, after = deltas_in(chain), served(tmp_path / "small")
    lost = np.sqrt(sum(np.linalg.norm(before[name] - after[name]) ** 2 for name in before))
    whole = np.sqrt(sum(np.linalg.norm(delta) ** 2 for delta in before.values()))
    assert small.compression == pytest.approx(lost / whole, rel=1e-5)
    assert small.probe is not None
    assert 1e-6 < small.probe.max_difference < small.probe.max_logit


# --- row 20: vLLM refuses valid adapters ---------------------------------------------------------


def trained_with_peft(folder: Path, **changes: Any) -> Path:
    """An adapter as people have them: made by the real peft, with nothing of Lamina in it."""
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings | changes)
    model = peft.get_peft_model(models.tiny_llama(), config)
    generator = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = generator.standard_normal(tuple(parameter.shape)) * 0.1
            parameter.data.copy_(torch.from_numpy(noise))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"use_dora": True}, "DoRA"),
        ({"r": 24}, "rank 24"),
    ],
)
def test_what_the_server_refuses_is_told_before_with_what_to_change(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    adapter = trained_with_peft(tmp_path / "a", **changes)
    with pytest.raises(ExportError) as refused:
        export(adapter, tmp_path / "out", target="vllm")
    (fault,) = refused.value.faults
    assert told in fault
    assert "lamina merge" in fault or "--max-lora-rank 32" in fault
    assert not (tmp_path / "out").exists()


def test_patterns_that_older_servers_pass_over_are_folded_in(tmp_path: Path) -> None:
    adapter = trained_with_peft(
        tmp_path / "a", rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 6}
    )
    v_proj = "model.layers.0.self_attn.v_proj"
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (
        tensors[f"base_model.model.{v_proj}.{leaf}.weight"].double().numpy()
        for leaf in ("lora_A", "lora_B")
    )
    meant = 6 / 2 * (b @ a)
    # Elsewhere it is served, without a word, as another adapter.
    assert made.off(served(adapter)[v_proj], meant) > 0.1
    report = export(adapter, tmp_path / "out", target="vllm", base=models.tiny_llama())
    assert made.off(served(tmp_path / "out")[v_proj], meant) < 1e-6
    assert report.probe is not None
    assert report.probe.passed
