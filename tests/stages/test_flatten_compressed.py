"""A chain as one adapter of fewer ranks, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lamina.checkpoint.probe import probe_tokens
from lamina.errors import CheckpointError, StageError
from lamina.model import PeftModel
from lamina.stages import flatten, lineage, load
from tests import models
from tests.stages.chains import (
    CONFIG,
    WEIGHTS,
    Snapshot,
    answer,
    deltas_in,
    distance,
    llama_lora,
    open_with_peft,
    run_stage,
    tensors_of,
)


def measured(before: Path, after: Path) -> dict[str, float]:
    """Plain module name -> relative distance of the dense updates, in float64."""
    theirs, ours = deltas_in(before), deltas_in(after)
    assert theirs.keys() == ours.keys()
    return {
        module: float(np.linalg.norm(ours[module] - dense) / np.linalg.norm(dense))
        for module, dense in theirs.items()
    }


@torch.no_grad()
def probe_logits(model: nn.Module) -> Tensor:
    tokens = torch.tensor([probe_tokens(models.tiny_llama())])
    return model(input_ids=tokens).logits


# --- with fewer ranks ----------------------------------------------------------------------------


def test_half_the_rank_and_the_error_that_is_measured(
    four: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    path = four[1]
    report = flatten(path, tmp_path / "half", rank=5, base=models.tiny_llama())
    assert not report.exact
    for module, relative in measured(path, tmp_path / "half").items():
        told = report.modules[module]
        assert told.relative_error == pytest.approx(relative, rel=1e-6, abs=1e-12)
        assert told.rank == min(5, told.rank_before)
        if told.rank_before > 5:
            values = np.linalg.svd(deltas_in(path)[module], compute_uv=False)
            tail = math.sqrt((values[5:] ** 2).sum() / (values**2).sum())
            assert told.relative_error == pytest.approx(tail, rel=1e-5)
            assert told.energy == pytest.approx(1 - tail**2, rel=1e-6)
    embedding = report.modules["model.embed_tokens"]
    assert (embedding.rank_before, embedding.rank) == (6, 5)
    assert report.relative_error > 0.01
    assert report.probe is not None
    difference = probe_logits(open_with_peft(tmp_path / "half")) - probe_logits(
        open_with_peft(path)
    )
    assert report.probe.max_difference == pytest.approx(float(difference.abs().max()), rel=1e-4)
    assert not report.probe.passed


def test_the_total_error_is_over_all_modules(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = four[1]
    names = ["domain", "dpo"]
    flatten(path, tmp_path / "whole", stages=names)
    report = flatten(path, tmp_path / "half", stages=names, rank=3)
    before, after = deltas_in(tmp_path / "whole"), deltas_in(tmp_path / "half")
    error = math.hypot(*(float(np.linalg.norm(before[m] - after[m])) for m in before))
    norm = math.hypot(*(float(np.linalg.norm(before[m])) for m in before))
    assert report.relative_error == pytest.approx(error / norm, rel=1e-6)
    assert report.energy == pytest.approx(1 - (error / norm) ** 2, rel=1e-6)
    assert lineage(tmp_path / "half").laminae[0].error == pytest.approx(error / norm, rel=1e-6)


def test_few_ranks_stay_bit_for_bit(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    report = flatten(four[1], tmp_path / "half", rank=7)
    before, after = tensors_of(four[1]), tensors_of(tmp_path / "half")
    kept = [module for module, each in report.modules.items() if each.rank_before <= 7]
    assert kept
    for module in kept:
        assert report.modules[module].relative_error == 0
        assert all(torch.equal(before[k], after[k]) for k in before if f".{module}." in k)


def test_a_share_of_the_update(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    report = flatten(four[1], tmp_path / "most", energy=0.9)
    far = measured(four[1], tmp_path / "most")
    for module, told in report.modules.items():
        assert told.energy >= 0.9
        if module in far:
            assert far[module] ** 2 <= 0.1 + 1e-6
            values = np.linalg.svd(deltas_in(four[1])[module], compute_uv=False)
            # One rank less would not do.
            less = (values[: told.rank - 1] ** 2).sum() / (values**2).sum()
            assert less < 0.9
    assert len({told.rank for told in report.modules.values()}) > 1
    assert (
        distance(
            answer(open_with_peft(tmp_path / "most")),
            answer(load(tmp_path / "most", models.tiny_llama())),
        )
        < 1e-6
    )


def test_a_rank_caps_a_share(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    report = flatten(four[1], tmp_path / "less", energy=0.999, rank=2)
    assert report.rank == (2, 2)


def test_errors_of_two_compressions_add_up(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    flatten(four[1], tmp_path / "six", rank=6)
    flatten(tmp_path / "six", tmp_path / "three", rank=3)
    straight = flatten(four[1], tmp_path / "straight", rank=3)
    recorded = lineage(tmp_path / "three").laminae[0].error
    assert recorded == pytest.approx(straight.relative_error, rel=1e-5)


def test_compressed_answers_are_recorded_where_there_is_a_base(
    four: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    base = models.tiny_llama()
    before = Snapshot(base)
    flatten(four[1], tmp_path / "with", rank=3, base=base)
    flatten(four[1], tmp_path / "without", rank=3)
    before.check()
    assert lineage(tmp_path / "without").newest.probe is None
    probe = lineage(tmp_path / "with").newest.probe
    assert probe is not None
    expected = probe_logits(open_with_peft(tmp_path / "with"))[0]
    assert probe.chain.largest == pytest.approx(float(expected.abs().max()), rel=1e-4)


def test_bfloat16_rounding_is_in_the_error(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora(r=8))
    halves = {key: x.bfloat16() for key, x in tensors_of(tmp_path / "one").items()}
    save_file(halves, tmp_path / "one" / WEIGHTS)
    report = flatten(tmp_path / "one", tmp_path / "flat", rank=7)
    assert report.dtypes == ("bfloat16",)
    for module, relative in measured(tmp_path / "one", tmp_path / "flat").items():
        assert report.modules[module].relative_error == pytest.approx(relative, rel=1e-6)
        assert relative > math.sqrt(1 - report.modules[module].energy) * (1 + 1e-6)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rank": 0}, "rank=0 is not a positive integer"),
        ({"rank": True}, "rank=True is not a positive integer"),
        ({"rank": 2.5}, "rank=2.5 is not a positive integer"),
        ({"energy": 0.0}, "energy=0.0 is not a share"),
        ({"energy": 1.5}, "energy=1.5 is not a share"),
    ],
)
def test_numbers_that_are_none(
    four: tuple[PeftModel, Path], tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(StageError) as caught:
        flatten(four[1], tmp_path / "out", stages=["dp"], **asked)
    # All that is wrong, at once.
    assert said in str(caught.value)
    assert "no 'dp'" in str(caught.value)


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    before = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    for out in (tmp_path / "one", tmp_path / "x" / ".." / "one"):
        with pytest.raises(CheckpointError, match="what is read from"):
            flatten(tmp_path / "one", out, force=True)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    with pytest.raises(CheckpointError, match="what is read from"):
        flatten(tmp_path / "one", tmp_path / "link", force=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()} == before


def test_a_place_with_files_needs_force(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        flatten(four[1], tmp_path)
    flatten(four[1], tmp_path, force=True)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", CONFIG, WEIGHTS}


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    tensors = tensors_of(tmp_path / "one")
    key = next(key for key in tensors if "layers.1.self_attn.v_proj.lora_B" in key)
    tensors[key][0, 0] = math.nan
    save_file(tensors, tmp_path / "one" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj"):
        flatten(tmp_path / "one", tmp_path / "flat", rank=2)
    assert not (tmp_path / "flat").exists()


def test_another_base_is_refused(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    with pytest.raises(StageError, match="another base"):
        flatten(four[1], tmp_path / "flat", base=models.tiny_llama(intermediate_size=48))
    assert not (tmp_path / "flat").exists()


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    report = flatten(tmp_path / "one", tmp_path / "flat")
    assert report.tokenizer == ("tokenizer.json",)
    assert (tmp_path / "flat" / "tokenizer.json").read_text() == "{}"
