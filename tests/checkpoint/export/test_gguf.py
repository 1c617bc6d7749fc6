"""GGUF: names, order of rows and scale as llama.cpp has them, written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.checkpoint.export.architectures import GGUF_ARCHITECTURES
from lamina.checkpoint.export.base_config import read_base_config
from lamina.checkpoint.export.gguf import FILE
from lamina.errors import ExportError
from lamina.stages.export import check_export, export
from tests.checkpoint.export import made

NAMES = {
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.1.self_attn.q_proj": "blk.1.attn_q",
    "model.layers.1.self_attn.k_proj": "blk.1.attn_k",
    "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
}


class Opened:
    """A file as llama.cpp takes it."""

    def __init__(self, folder: Path) -> None:
        reader = gguf.GGUFReader(folder / FILE)
        self.values = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {each.name: each.tensor_type.name for each in reader.tensors}
        # GGUF counts dimensions from the fastest one.
        self.ne = {each.name: tuple(map(int, each.shape)) for each in reader.tensors}
        self.data = {
            each.name: gguf.quants.dequantize(each.data, each.tensor_type).astype(np.float64)
            for each in reader.tensors
        }

    def delta(self, name: str) -> made.Array:
        """`alpha / rank * b @ a`, the rank being the first dimension of b."""
        scale = self.values["adapter.lora.alpha"] / self.ne[f"{name}.weight.lora_b"][0]
        a, b = (self.data[f"{name}.weight.{leaf}"] for leaf in ("lora_a", "lora_b"))
        return np.asarray(scale * (b @ a))


def in_order_of_ggml(delta: made.Array, heads: int) -> made.Array:
    """Rows of each head: 0, n/2, 1, n/2 + 1 ... instead of one half after the other."""
    moved = np.empty_like(delta)
    size = delta.shape[0] // heads
    for head in range(heads):
        for pair in range(size // 2):
            for half in range(2):
                moved[head * size + 2 * pair + half] = delta[head * size + half * size // 2 + pair]
    return moved


def write(tmp_path: Path, adapter: Path | None = None, **options: Any) -> Opened:
    base = made.base_config(tmp_path / "base", **options.pop("base", {}))
    source = adapter or made.write(tmp_path / "a")
    settings = {"target": "gguf", "base": read_base_config(str(base))}
    export(source, tmp_path / "out", **settings | options)
    return Opened(tmp_path / "out")


def test_every_update_is_the_one_that_llama_cpp_computes(tmp_path: Path) -> None:
    opened = write(tmp_path)
    assert sorted(opened.data) == sorted(
        f"{name}.weight.{leaf}" for name in NAMES.values() for leaf in ("lora_a", "lora_b")
    )
    heads = {"q_proj": made.HEADS, "k_proj": made.KV_HEADS}
    for module, delta in made.deltas().items():
        leaf = module.rpartition(".")[2]
        expected = in_order_of_ggml(delta, heads[leaf]) if leaf in heads else delta
        assert made.off(opened.delta(NAMES[module]), expected) < 1e-6, module
        if leaf in heads:
            # The order matters: without it the update is another one.
            assert made.off(opened.delta(NAMES[module]), delta) > 0.1, module


def test_shapes_are_those_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    opened = write(tmp_path)
    for module, (inner, outer, rank, _) in made.MODULES.items():
        assert opened.ne[f"{NAMES[module]}.weight.lora_a"] == (inner, rank)
        assert opened.ne[f"{NAMES[module]}.weight.lora_b"] == (rank, outer)


def test_the_header_says_what_the_file_is(tmp_path: Path) -> None:
    opened = write(tmp_path)
    assert opened.values["general.type"] == "adapter"
    assert opened.values["general.architecture"] == "llama"
    assert opened.values["adapter.type"] == "lora"
    # Four of the five modules agree on it: only B of the others is rounded.
    assert opened.values["adapter.lora.alpha"] == 4.0
    a = made.factors()[f"{made.PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert np.array_equal(opened.data["blk.0.attn_q.weight.lora_a"], a.double().numpy())


def test_a_scaling_that_fp32_cannot_say_goes_into_B(tmp_path: Path) -> None:
    config = made.adapter_config(lora_alpha=0.1, rank_pattern={}, alpha_pattern={}, r=2)
    module = "model.layers.0.self_attn.q_proj"
    tensors = {key: value for key, value in made.factors().items() if module in key}
    opened = write(tmp_path, made.write(tmp_path / "a", tensors, config))
    assert opened.values["adapter.lora.alpha"] == 2.0
    a, b = (
        tensors[f"{made.PREFIX}{module}.{x}.weight"].double().numpy() for x in ("lora_A", "lora_B")
    )
    expected = in_order_of_ggml(0.05 * (b @ a), made.HEADS)
    assert made.off(opened.delta("blk.0.attn_q"), expected) < 1e-7


def test_alpha_is_never_zero_which_would_mean_no_scaling(tmp_path: Path) -> None:
    assert write(tmp_path).values["adapter.lora.alpha"] != 0


def test_other_architectures_keep_the_order_of_rows(tmp_path: Path) -> None:
    opened = write(tmp_path, base={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})
    assert opened.values["general.architecture"] == "qwen2"
    for module, delta in made.deltas().items():
        assert made.off(opened.delta(NAMES[module]), delta) < 1e-6


def test_weights_that_are_stored_in_by_out_lie_as_all_others(tmp_path: Path) -> None:
    # GPT-2's weights are in x out; A and B of an adapter are as everywhere.
    module, outer = "transformer.h.0.attn.c_attn", 3 * made.HIDDEN
    a, b = made.values(2, made.HIDDEN, seed=1), made.values(outer, 2, seed=2)
    tensors = {f"{made.PREFIX}{module}.lora_A.weight": a, f"{made.PREFIX}{module}.lora_B.weight": b}
    config = made.adapter_config(fan_in_fan_out=True, rank_pattern={}, alpha_pattern={})
    base = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    opened = write(tmp_path, made.write(tmp_path / "a", tensors, config), base=base)
    assert opened.ne["blk.0.attn_qkv.weight.lora_a"] == (made.HIDDEN, 2)
    assert opened.ne["blk.0.attn_qkv.weight.lora_b"] == (2, outer)
    expected = 2.0 * (b.double() @ a.double()).numpy()
    assert made.off(opened.delta("blk.0.attn_qkv"), expected) < 1e-7


@pytest.mark.parametrize(
    ("dtype", "kind", "tolerance"),
    [(torch.float16, "F16", 2e-3), (torch.bfloat16, "BF16", 1e-2), (None, "F32", 1e-6)],
)
def test_the_dtype_is_as_asked(
    tmp_path: Path, dtype: torch.dtype | None, kind: str, tolerance: float
) -> None:
    opened = write(tmp_path, dtype=dtype)
    assert set(opened.types.values()) == {kind}
    expected = made.deltas()["model.layers.1.mlp.down_proj"]
    assert made.off(opened.delta("blk.1.ffn_down"), expected) < tolerance


def test_what_fp16_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = {key: 1e6 * value for key, value in made.factors().items()}
    with pytest.raises(ExportError, match="differs from the adapter"):
        write(tmp_path, made.write(tmp_path / "a", tensors), dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def table(rows: int = made.VOCABULARY) -> dict[str, Tensor]:
    return {
        f"{made.PREFIX}model.embed_tokens.lora_embedding_A": made.values(2, rows, seed=20),
        f"{made.PREFIX}model.embed_tokens.lora_embedding_B": made.values(made.HIDDEN, 2, seed=21),
    }


def test_an_embedding_lies_the_way_its_rows_are_looked_up(tmp_path: Path) -> None:
    tensors = {**made.factors(), **table()}
    opened = write(tmp_path, made.write(tmp_path / "a", tensors))
    a, b = table().values()
    # llama.cpp: b @ a[token] for a token, times alpha / r.
    rows = opened.data["token_embd.weight.lora_a"]
    scale = opened.values["adapter.lora.alpha"] / opened.ne["token_embd.weight.lora_b"][0]
    found = np.stack([scale * opened.data["token_embd.weight.lora_b"] @ row for row in rows])
    expected = (2.0 * (b.double() @ a.double())).mT.numpy()
    assert made.off(found, expected) < 1e-6
    # ne[1] of a has to be the vocabulary, ne[1] of b the width.
    assert opened.ne["token_embd.weight.lora_a"][1] == made.VOCABULARY
    assert opened.ne["token_embd.weight.lora_b"][1] == made.HIDDEN


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_tables_is_refused(tmp_path: Path, name: str) -> None:
    tensors = dict(table())
    if name == "lm_head":
        tensors = {
            f"{made.PREFIX}lm_head.lora_A.weight": made.values(2, made.HIDDEN, seed=20),
            f"{made.PREFIX}lm_head.lora_B.weight": made.values(made.VOCABULARY, 2, seed=21),
        }
    adapter = made.write(tmp_path / "a", {**made.factors(), **tensors})
    for tied, faults in ((True, 1), (False, 0)):
        base = made.base_config(tmp_path / "base", tie_word_embeddings=tied)
        checked = check_export(adapter, target="gguf", base=str(base))
        assert len(checked.faults) == faults
    assert (
        "merge"
        in check_export(
            adapter,
            target="gguf",
            base=str(made.base_config(tmp_path / "base", tie_word_embeddings=True)),
        )
        .faults[0]
        .cure
    )


def test_without_the_base_nothing_is_guessed(tmp_path: Path) -> None:
    config = made.adapter_config(base_model_name_or_path=None)
    (fault,) = check_export(made.write(tmp_path / "a", config=config), target="gguf").faults
    assert "architecture" in fault.what
    assert "--base" in fault.cure


def test_the_base_on_record_is_asked_where_it_is_a_directory(tmp_path: Path) -> None:
    base = made.base_config(tmp_path / "base")
    config = made.adapter_config(base_model_name_or_path=str(base))
    assert check_export(made.write(tmp_path / "a", config=config), target="gguf").ok


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    base = made.base_config(tmp_path / "base", architectures=["FalconForCausalLM"])
    (fault,) = check_export(made.write(tmp_path / "a"), target="gguf", base=str(base)).faults
    assert "FalconForCausalLM" in fault.what
    assert "LlamaForCausalLM" in fault.cure


def test_modules_without_a_name_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        key.replace("model.layers.1.mlp", "model.layers.1.moon"): value
        for key, value in made.factors().items()
    }
    base = made.base_config(tmp_path / "base")
    adapter = made.write(tmp_path / "a", tensors)
    (fault,) = check_export(adapter, target="gguf", base=str(base)).faults
    assert "model.layers.1.moon.down_proj" in fault.what


def test_an_adapter_that_waits_for_tokens_says_for_which(tmp_path: Path) -> None:
    config = made.adapter_config(alora_invocation_tokens=[5, 7])
    opened = write(tmp_path, made.write(tmp_path / "a", config=config))
    assert list(opened.values["adapter.alora.invocation_tokens"]) == [5, 7]


def test_the_record_goes_along_unless_it_is_stripped(tmp_path: Path) -> None:
    adapter = made.write(tmp_path / "a", metadata=made.record().to_metadata())
    opened = write(tmp_path, adapter)
    assert '"sft"' in opened.values["lamina"]
    assert "lamina" not in write(tmp_path, adapter, keep_record=False, force=True).values


def test_every_architecture_is_one_of_ggufs() -> None:
    known = set(gguf.MODEL_ARCH_NAMES.values())
    assert {each.name for each in GGUF_ARCHITECTURES.values()} <= known
