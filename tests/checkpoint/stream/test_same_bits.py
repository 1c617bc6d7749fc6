"""A streamed merge has the bits of one in memory, for all that can be adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lamina import LoraConfig
from lamina.checkpoint.stream.changes import Folded
from tests import models
from tests.checkpoint.stream.merging import differing, merged_both_ways, saved

LINEAR = ["q_proj", "down_proj"]


def mixtral(num_local_experts: int = 4) -> Any:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=num_local_experts,
    )
    with models.seeded(0):
        return MixtralForCausalLM(config).eval()


def qwen2() -> Any:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with models.seeded(0):
        return Qwen2ForCausalLM(config).eval()


def t5() -> Any:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0
    )
    with models.seeded(0):
        return T5ForConditionalGeneration(config).eval()


LLAMA = models.tiny_llama
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (LLAMA, {"target_modules": LINEAR}),
    "all-linear": (LLAMA, {"target_modules": "all-linear"}),
    "rank and alpha patterns, rslora": (
        LLAMA,
        {
            "target_modules": LINEAR,
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {"q_proj": 5},
            "use_rslora": True,
        },
    ),
    "conv1d": (models.tiny_gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "conv1d, dora": (models.tiny_gpt2, {"target_modules": ["c_attn"], "use_dora": True}),
    "dora": (LLAMA, {"target_modules": LINEAR, "use_dora": True}),
    "embedding": (LLAMA, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, dora": (LLAMA, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "head": (LLAMA, {"target_modules": ["lm_head", "q_proj"]}),
    "bias of B": (qwen2, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "all biases": (qwen2, {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of LoRA": (models.tiny_gpt2, {"target_modules": ["c_fc"], "bias": "lora_only"}),
    "saved head": (LLAMA, {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}),
    "saved norm": (LLAMA, {"target_modules": LINEAR, "modules_to_save": ["norm"]}),
    "token rows": (
        LLAMA,
        {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [3, 9, 40]}},
    ),
    "token rows over an embedding": (
        LLAMA,
        {"target_modules": ["embed_tokens"], "trainable_token_indices": {"embed_tokens": [3, 9]}},
    ),
    "experts": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "encoder-decoder": (t5, {"target_modules": ["q", "wi"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_the_same_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, settings = KINDS[kind]
    task = "SEQ_2_SEQ_LM" if kind == "encoder-decoder" else "CAUSAL_LM"
    config = LoraConfig(r=4, lora_alpha=8, task_type=task, **settings)
    saved(make(), tmp_path, config, dtype=dtype, shards=dtype == torch.bfloat16)
    streamed, _ = merged_both_ways(tmp_path)
    assert streamed.streamed
    assert differing(tmp_path / "streamed", tmp_path / "whole") == []
    assert differing(tmp_path / "streamed", tmp_path / "base") != []
    assert streamed.dtype == str(dtype).removeprefix("torch.")


def test_experts_that_lie_apart_are_merged_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.gate_up_proj"], task_type="CAUSAL_LM"
    )
    saved(mixtral(num_local_experts=11), tmp_path, config, dtype=torch.bfloat16, shards=True)
    folded = []
    part = Folded.part

    def counted(self: Folded, value: torch.Tensor, *args: Any) -> torch.Tensor:
        folded.append(tuple(value.shape))
        return part(self, value, *args)

    monkeypatch.setattr(Folded, "part", counted)
    report, _ = merged_both_ways(tmp_path)
    assert differing(tmp_path / "streamed", tmp_path / "whole") == []
    assert folded == [(1, 96, 32)] * 22
    assert set(differing(tmp_path / "streamed", tmp_path / "base")) == {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
        for layer in range(2)
        for expert in range(11)
        for name in ("w1", "w3")
    }
    assert report.verified is not None
    assert report.verified.unseen == 44
