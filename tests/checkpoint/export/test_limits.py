"""What vLLM refuses is told from headers, with a cure each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.checkpoint.export.contents import Contents, read_contents, sort_contents
from lamina.checkpoint.export.limits import vllm_faults, vllm_notes
from lamina.checkpoint.export.vllm_ranks import VLLM_RANKS, rank_flag
from tests.checkpoint.export import made


def contents(extra: dict[str, tuple[int, ...]] | None = None, **changes: Any) -> Contents:
    shapes = {key: tuple(tensor.shape) for key, tensor in made.factors().items()} | (extra or {})
    header = {key: {"shape": shape, "dtype": "F32"} for key, shape in shapes.items()}
    return sort_contents("DIR", made.adapter_config(**changes), header)


def test_a_plain_adapter_has_no_fault() -> None:
    assert vllm_faults(contents()) == []
    assert vllm_notes(contents()) == []


def test_the_largest_rank_counts() -> None:
    (fault,) = vllm_faults(contents(), max_rank=1)
    assert "rank 3 is over --max-lora-rank 1" in fault.what
    assert "--max-lora-rank 8" in fault.cure
    assert "--rank 1" in fault.cure
    assert vllm_faults(contents(), max_rank=1, rank=1) == []


def test_a_rank_gets_the_smallest_flag_that_takes_it() -> None:
    assert [rank_flag(rank) for rank in (1, 2, 16, 17, 257, 512, 513)] == [
        1, 8, 16, 32, 320, 512, None,
    ]  # fmt: skip


def test_a_flag_that_no_server_has_is_a_fault() -> None:
    (fault,) = vllm_faults(contents(), max_rank=24)
    assert "24" in fault.what
    assert all(str(rank) in fault.cure for rank in VLLM_RANKS)


def test_a_rank_over_the_largest_flag_can_only_be_compressed() -> None:
    big = {
        f"{made.PREFIX}model.layers.0.mlp.up_proj.lora_A.weight": (600, 16),
        f"{made.PREFIX}model.layers.0.mlp.up_proj.lora_B.weight": (24, 600),
    }
    (fault,) = vllm_faults(contents(big), max_rank=512)
    assert "largest is 512" in fault.cure
    assert "--rank 512" in fault.cure


WHOLE = f"{made.PREFIX}model.embed_tokens.weight"
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("extra", "changes", "told"),
    [
        ({WHOLE: (12, 16)}, {"modules_to_save": ["embed_tokens"]}, "model.embed_tokens"),
        (
            {f"{made.PREFIX}{Q}.lora_magnitude_vector": (16,)},
            {"use_dora": True},
            "DoRA",
        ),
        ({}, {"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({}, {"use_qalora": True}, "QA-LoRA"),
        ({}, {"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({}, {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({f"{made.PREFIX}{Q}.lora_B.bias": (16,)}, {"lora_bias": True}, Q),
        ({f"{made.PREFIX}{Q}.base_layer.bias": (16,)}, {"bias": "lora_only"}, "biases"),
        (
            {f"{made.PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 16)},
            {"trainable_token_indices": [1, 2]},
            "token rows",
        ),
        (
            {
                f"{made.PREFIX}stem.lora_A.weight": (2, 3, 3, 3),
                f"{made.PREFIX}stem.lora_B.weight": (8, 2, 1, 1),
            },
            {},
            "stem",
        ),
        (
            {f"{made.PREFIX}model.embed_tokens.base_layer.weight": (12, 16)},
            {},
            "values of the base",
        ),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_told_with_a_cure(
    extra: dict[str, tuple[int, ...]], changes: dict[str, Any], told: str
) -> None:
    faults = vllm_faults(contents(extra, **changes))
    assert len(faults) == 1
    assert told in faults[0].what
    assert faults[0].cure


def test_all_faults_are_told_at_once() -> None:
    faults = vllm_faults(
        contents({WHOLE: (12, 16)}, modules_to_save=["embed_tokens"], use_dora=True), max_rank=1
    )
    assert len(faults) == 3


def test_one_classification_head_is_taken_with_a_note() -> None:
    head = {f"{made.PREFIX}score.weight": (3, 16)}
    found = contents(head, modules_to_save=["score"])
    assert vllm_faults(found) == []
    assert "score" in vllm_notes(found)[0].what
    two = head | {f"{made.PREFIX}classifier.weight": (3, 16)}
    assert vllm_faults(contents(two, modules_to_save=["score", "classifier"]))


def test_half_an_adapted_module_is_a_fault() -> None:
    half = {f"{made.PREFIX}model.layers.0.mlp.up_proj.lora_A.weight": (2, 16)}
    assert "has no B" in vllm_faults(contents(half))[0].what


def test_experts_ranks_are_counted_one_by_one() -> None:
    experts = {
        f"{made.PREFIX}model.layers.0.mlp.experts.lora_A.weight": (2 * 32, 16),
        f"{made.PREFIX}model.layers.0.mlp.experts.lora_B.weight": (24, 2 * 32),
    }
    found = contents(experts, target_parameters=["mlp.experts.down_proj"])
    # 2 in each of 32; one module beside them has 3.
    assert found.rank == 3
    assert "experts" in vllm_notes(found)[0].what


def test_contents_are_read_from_a_directory_whatever_prefixes_its_names_have(
    tmp_path: Path,
) -> None:
    named = {
        key.replace(".lora_A.", ".lora_A.default."): tensor
        for key, tensor in made.factors().items()
    }
    found = read_contents(made.write(tmp_path / "a", named))
    assert {each.module: found.scaling(each) for each in found.factors} == {
        module: alpha / rank for module, (_, _, rank, alpha) in made.MODULES.items()
    }
    assert torch.Size(found.shapes[f"{made.PREFIX}{Q}.lora_A.weight"]) == (2, 16)


def test_a_rank_limit_is_known_without_torch() -> None:
    code = "import lamina.checkpoint.export.limits, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"q": 2}}, {"alpha_pattern": {"q": 2}}])
def test_patterns_beside_experts_are_refused(pattern: dict[str, Any]) -> None:
    experts = {
        f"{made.PREFIX}model.layers.0.mlp.experts.lora_A.weight": (2 * 32, 16),
        f"{made.PREFIX}model.layers.0.mlp.experts.lora_B.weight": (24, 2 * 32),
    }
    none: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    settings = {"target_parameters": ["mlp.experts.down_proj"], **none}
    assert vllm_faults(contents(experts, **settings)) == []
    (fault,) = vllm_faults(contents(experts, **settings | pattern))
    assert next(iter(pattern)) in fault.what
