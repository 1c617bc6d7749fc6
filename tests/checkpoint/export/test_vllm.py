"""A directory for vLLM: read by hand as its releases do, old and new, and by the real peft."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lamina.checkpoint.digest import tensors_digest
from lamina.checkpoint.record import read_record
from lamina.config.patterns import first_match
from lamina.errors import ExportError
from lamina.stages.export import check_export, export
from tests import models
from tests.checkpoint.export import made


def config_in(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return values


def deltas_in(folder: Path, *, patterns: bool) -> dict[str, made.Array]:
    """Module -> its update by the global numbers (older vLLM), or by patterns too (newer)."""
    config, tensors = config_in(folder), load_file(folder / "adapter_model.safetensors")
    found = {}
    for module in made.MODULES:
        rank, alpha = config["r"], config["lora_alpha"]
        if patterns:
            rank = first_match(config["rank_pattern"], module, rank)
            alpha = first_match(config["alpha_pattern"], module, alpha)
        a, b = (
            tensors[f"{made.PREFIX}{module}.{leaf}.weight"].double().numpy()
            for leaf in ("lora_A", "lora_B")
        )
        found[module] = alpha / rank * (b @ a)
    return found


@pytest.mark.parametrize("patterns", [False, True])
def test_old_and_new_releases_compute_the_adapters_updates(tmp_path: Path, patterns: bool) -> None:
    report = export(made.write(tmp_path / "a"), tmp_path / "out", target="vllm")
    found = deltas_in(tmp_path / "out", patterns=patterns)
    for module, expected in made.deltas().items():
        assert made.off(found[module], expected) < 1e-6, module
    assert report.difference < 1e-6
    # The adapter as it was is another one to a release that takes the global numbers only.
    config = made.adapter_config()
    assert config["lora_alpha"] / config["r"] != 5 / 3


def test_factors_of_the_common_scaling_keep_their_bits(tmp_path: Path) -> None:
    export(made.write(tmp_path / "a"), tmp_path / "out", target="vllm")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in made.factors().items():
        unchanged = "lora_A" in key or "layers.0" in key or "k_proj" in key
        assert torch.equal(tensors[key], tensor) == unchanged, key


def test_scaling_by_the_root_of_the_rank_becomes_plain(tmp_path: Path) -> None:
    config = made.adapter_config(use_rslora=True)
    export(made.write(tmp_path / "a", config=config), tmp_path / "out", target="vllm")
    assert "use_rslora" not in config_in(tmp_path / "out")
    found = deltas_in(tmp_path / "out", patterns=False)
    for module, expected in made.deltas().items():
        rank = made.MODULES[module][2]
        assert made.off(found[module], expected * math.sqrt(rank)) < 1e-6


def test_the_config_has_what_vllm_reads_and_nothing_that_it_refuses(tmp_path: Path) -> None:
    export(made.write(tmp_path / "a"), tmp_path / "out", target="vllm")
    config = config_in(tmp_path / "out")
    # r is what the server's limit is compared with: the largest rank there is.
    assert config["r"] == 3
    assert config["lora_alpha"] == 6
    assert config["bias"] == "none"
    assert config["init_lora_weights"] is True
    assert sorted(config["target_modules"]) == ["down_proj", "k_proj", "q_proj"]
    assert not {"modules_to_save", "use_dora", "lora_bias", "layer_replication"} & config.keys()
    assert config["base_model_name_or_path"] == "some/base"


def test_half_precision_stays_where_nothing_is_rounded(tmp_path: Path) -> None:
    tensors = {key: value.bfloat16() for key, value in made.factors().items()}
    export(made.write(tmp_path / "a", tensors), tmp_path / "out", target="vllm")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    module = f"{made.PREFIX}model.layers.0.self_attn.q_proj"
    assert written[f"{module}.lora_B.weight"].dtype == torch.bfloat16
    found = deltas_in(tmp_path / "out", patterns=False)
    for module, expected in made.deltas(tensors).items():
        assert made.off(found[module], expected) < 1e-6, module


def test_the_dtype_is_as_asked(tmp_path: Path) -> None:
    export(made.write(tmp_path / "a"), tmp_path / "out", target="vllm", dtype=torch.float16)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}


def test_the_record_stays_in_the_header_with_a_digest_that_holds(tmp_path: Path) -> None:
    record = made.record().model_copy(update={"weights": "0" * 64})
    adapter = made.write(tmp_path / "a", metadata=record.to_metadata())
    export(adapter, tmp_path / "out", target="vllm")
    weights = tmp_path / "out" / "adapter_model.safetensors"
    with safe_open(weights, framework="pt") as opened:
        kept = read_record(opened.metadata())
    assert kept is not None
    assert kept.stages == record.stages
    assert kept.weights == tensors_digest(load_file(weights))


def test_a_classification_head_goes_along_whole(tmp_path: Path) -> None:
    head = {f"{made.PREFIX}score.weight": made.values(3, made.HIDDEN, seed=30)}
    config = made.adapter_config(modules_to_save=["score"])
    adapter = made.write(tmp_path / "a", {**made.factors(), **head}, config)
    report = export(adapter, tmp_path / "out", target="vllm")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(*(tensors[f"{made.PREFIX}score.weight"] for tensors in (written, head)))
    assert config_in(tmp_path / "out")["modules_to_save"] == ["score"]
    assert "score" in report.notes[0].what


def test_copies_of_the_bases_table_are_left_out_only_if_they_are_its_own(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    own = made.values(made.VOCABULARY, made.HIDDEN, seed=40)
    base = made.base_config(tmp_path / "base")
    save_file({"model.embed_tokens.weight": own}, base / "model.safetensors")
    table = f"{made.PREFIX}model.embed_tokens"
    for change, ok in ((0.0, True), (0.5, False)):
        tensors = {
            **made.factors(),
            f"{table}.lora_embedding_A": made.values(2, made.VOCABULARY, seed=20),
            f"{table}.lora_embedding_B": made.values(made.HIDDEN, 2, seed=21),
            f"{table}.base_layer.weight": own + change,
        }
        adapter = made.write(tmp_path / "a", tensors)
        assert not check_export(adapter, target="vllm").ok
        assert check_export(adapter, target="vllm", base=str(base)).ok == ok
        model = models.tiny_llama(vocab_size=made.VOCABULARY, hidden_size=made.HIDDEN)
        model.model.embed_tokens.weight.data.copy_(own)
        assert check_export(adapter, target="vllm", base=model).ok == ok


def test_a_refusal_says_all_that_is_wrong_and_writes_nothing(tmp_path: Path) -> None:
    head = {f"{made.PREFIX}model.norm.weight": made.values(made.HIDDEN, seed=30)}
    config = made.adapter_config(modules_to_save=["norm"])
    adapter = made.write(tmp_path / "a", {**made.factors(), **head}, config)
    with pytest.raises(ExportError) as refused:
        export(adapter, tmp_path / "out", target="vllm", max_rank=1)
    assert len(refused.value.faults) == 2
    assert "--max-lora-rank" in refused.value.faults[0]
    assert "lamina merge" in refused.value.faults[1]
    assert not (tmp_path / "out").exists()
