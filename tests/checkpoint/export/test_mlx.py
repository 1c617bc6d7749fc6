"""mlx-lm's files, used by hand as mlx-lm uses them: y += scale * (x @ lora_a) @ lora_b."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lamina.checkpoint.export.mlx import keys
from lamina.stages.export import check_export, export
from tests.checkpoint.export import made


def written(tmp_path: Path, adapter: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    export(adapter, tmp_path / "out", target="mlx", **options)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    return config, load_file(tmp_path / "out" / "adapters.safetensors")


def test_outputs_are_those_of_the_adapter(tmp_path: Path) -> None:
    config, tensors = written(tmp_path, made.write(tmp_path / "a"))
    scale = config["lora_parameters"]["scale"]
    for module, delta in made.deltas().items():
        x = np.linspace(-1, 1, 3 * delta.shape[1]).reshape(3, -1)
        a, b = (tensors[f"{module}.{leaf}"].astype(np.float64) for leaf in ("lora_a", "lora_b"))
        assert made.off(scale * (x @ a) @ b, x @ delta.T) < 1e-6, module


def test_all_layers_have_the_one_rank_that_mlx_builds(tmp_path: Path) -> None:
    config, tensors = written(tmp_path, made.write(tmp_path / "a"))
    rank = config["lora_parameters"]["rank"]
    assert rank == 3
    for module, (inner, outer, _, _) in made.MODULES.items():
        assert tensors[f"{module}.lora_a"].shape == (inner, rank)
        assert tensors[f"{module}.lora_b"].shape == (rank, outer)
    # mlx-lm stops at any other tensor.
    assert len(tensors) == 2 * len(made.MODULES)


def test_the_config_names_layers_as_they_are_called_in_a_block(tmp_path: Path) -> None:
    base = made.base_config(tmp_path / "base")
    config, _ = written(tmp_path, made.write(tmp_path / "a"), base=str(base))
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == made.LAYERS
    assert config["lora_parameters"]["keys"] == [
        "mlp.down_proj",
        "self_attn.k_proj",
        "self_attn.q_proj",
    ]


def test_without_the_base_all_blocks_are_meant(tmp_path: Path) -> None:
    config, _ = written(tmp_path, made.write(tmp_path / "a"))
    # model.layers[-max(num_layers, 0):] are all of them.
    assert config["num_layers"] == -1


def test_what_lies_outside_of_blocks_has_its_whole_name() -> None:
    assert keys(["lm_head", "model.layers.3.mlp.up_proj", "model.layers.11.mlp.up_proj"]) == [
        "lm_head",
        "mlp.up_proj",
    ]


def test_an_embedding_is_rows_by_rank(tmp_path: Path) -> None:
    module = "model.embed_tokens"
    table = {
        f"{made.PREFIX}{module}.lora_embedding_A": made.values(2, made.VOCABULARY, seed=20),
        f"{made.PREFIX}{module}.lora_embedding_B": made.values(made.HIDDEN, 2, seed=21),
    }
    adapter = made.write(tmp_path / "a", {**made.factors(), **table})
    config, tensors = written(tmp_path, adapter)
    a, b = (tensors[f"{module}.{leaf}"].astype(np.float64) for leaf in ("lora_a", "lora_b"))
    expected = 2.0 * np.linalg.multi_dot([x.double().numpy() for x in reversed(table.values())]).T
    assert made.off(config["lora_parameters"]["scale"] * a @ b, expected) < 1e-6


def test_names_that_mlx_may_not_have_are_told(tmp_path: Path) -> None:
    adapter = made.write(tmp_path / "a")
    assert check_export(adapter, target="mlx").notes
    known = made.base_config(tmp_path / "llama")
    assert not check_export(adapter, target="mlx", base=str(known)).notes
    other = made.base_config(
        tmp_path / "gpt2", model_type="gpt2", architectures=["GPT2LMHeadModel"]
    )
    (fault,) = check_export(adapter, target="mlx", base=str(other)).faults
    assert "gpt2" in fault.what


@pytest.mark.parametrize("tied", [True, False])
def test_one_of_two_tied_tables_is_refused(tmp_path: Path, tied: bool) -> None:
    head = {
        f"{made.PREFIX}lm_head.lora_A.weight": made.values(2, made.HIDDEN, seed=20),
        f"{made.PREFIX}lm_head.lora_B.weight": made.values(made.VOCABULARY, 2, seed=21),
    }
    adapter = made.write(tmp_path / "a", {**made.factors(), **head})
    base = made.base_config(tmp_path / "base", tie_word_embeddings=tied)
    assert check_export(adapter, target="mlx", base=str(base)).ok != tied


def test_the_dtype_is_as_asked(tmp_path: Path) -> None:
    _, tensors = written(tmp_path, made.write(tmp_path / "a"), dtype=torch.float16)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}
