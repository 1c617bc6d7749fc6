"""Chains as they were when an earlier stage was saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.checkpoint.adapter import read_adapter
from lamina.errors import StageError
from lamina.model import PeftModel, loading
from lamina.stages.earlier import earlier
from tests import models
from tests.stages.chains import (
    answer,
    distance,
    llama_lora,
    rewrite_record,
    run_chain,
    save_plain_peft,
)

CHAIN = [
    ("domain", None, llama_lora()),
    ("chat", "stack", llama_lora(r=6, lora_alpha=9, target_modules=["q_proj", "k_proj"])),
    ("dpo", "continue", None),
    ("last", "stack", llama_lora(r=2, lora_alpha=2)),
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    run_chain(folder, CHAIN)
    return folder


def answered(path: Path, stage: str) -> torch.Tensor:
    file = earlier(read_adapter(path), stage)
    kind = PeftModel.for_task(file.config.task_type)
    return answer(loading.over(kind, models.tiny_llama(), file, loading.How(), stage).eval())


@pytest.mark.parametrize("stage", ["domain", "chat", "dpo", "last"])
def test_they_answer_as_the_directory_of_the_stage(chain: Path, stage: str) -> None:
    expected = answer(PeftModel.from_pretrained(models.tiny_llama(), chain / stage).eval())
    assert distance(answered(chain / "last", stage), expected) < 1e-5


def test_ranks_that_nobody_trained_on_need_no_other_directory(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "last", tmp_path / "alone")
    for stage in ("domain", "dpo", "last"):
        expected = answer(PeftModel.from_pretrained(models.tiny_llama(), chain / stage).eval())
        assert distance(answered(tmp_path / "alone", stage), expected) < 1e-5
    file = earlier(read_adapter(tmp_path / "alone"), "dpo")
    record = file.record()
    assert [each.name for each in record.stages] == ["domain", "chat", "dpo"]
    # What it answered when it was saved still holds.
    assert record.newest.probe == read_adapter(chain / "dpo").record().newest.probe


def test_ranks_that_were_trained_on_are_told_of_where_they_are_gone(
    chain: Path, tmp_path: Path
) -> None:
    shutil.copytree(chain / "last", tmp_path / "last")
    with pytest.raises(StageError, match=r"no longer has 'chat'.*'dpo' trained its ranks on") as no:
        earlier(read_adapter(tmp_path / "last"), "chat")
    assert "there is no" in no.value.faults[0]
    assert "saved to" in (no.value.cure or "")


def test_a_directory_of_another_chain_is_not_taken_for_it(chain: Path, tmp_path: Path) -> None:
    # Of the same names and modes, and saved in the same second.
    run_chain(tmp_path, CHAIN[:2], seed=3)
    saved = read_adapter(chain / "chat").record()

    def same_times(record: Any) -> None:
        for stage, other in zip(record["stages"], saved.stages, strict=True):
            stage["created"] = other.created

    rewrite_record(tmp_path / "chat", same_times)
    shutil.copytree(chain / "last", tmp_path / "last")
    with pytest.raises(StageError, match="no longer has 'chat'") as caught:
        earlier(read_adapter(tmp_path / "last"), "chat")
    assert "is of another chain" in caught.value.faults[0]


def test_modules_that_a_later_stage_trained_anew_are_taken_from_beside(tmp_path: Path) -> None:
    run_chain(
        tmp_path,
        [
            ("a", None, llama_lora(modules_to_save=["lm_head"])),
            ("b", "stack", llama_lora(modules_to_save=["lm_head"])),
        ],
    )
    expected = answer(PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "a").eval())
    assert distance(answered(tmp_path / "b", "a"), expected) < 1e-6
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(StageError, match="trained over it; lm_head, trained whole by a"):
        earlier(read_adapter(tmp_path / "b"), "a")


def test_unknown_stages_name_the_nearest(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="choose 'domain'"):
        earlier(read_adapter(chain / "last"), "domian")
    save_plain_peft(tmp_path / "plain", {"r": 2, "target_modules": ["q_proj"]})
    with pytest.raises(StageError, match="imported"):
        earlier(read_adapter(tmp_path / "plain"), "domain")
