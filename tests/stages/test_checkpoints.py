"""What a trainer does with a stage: save_pretrained, and load_adapter over what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamina import LoraConfig, begin_stage, lineage, load
from lamina.errors import StageError
from tests import models
from tests.adapters import fill, logits, same, trained, weights


def config(**changes: Any) -> LoraConfig:
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], **changes}
    return LoraConfig(task_type="CAUSAL_LM", **settings)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    model = begin_stage(models.tiny_llama(), name="one", config=config(r=4))
    fill(model, "one", seed=1)
    model.save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def begin(mode: str, parent: Path, name: str = "two", **changes: Any) -> Any:
    own = None if mode == "continue" else config(**changes)
    return begin_stage(models.tiny_llama(), name=name, parent=parent, mode=mode, config=own)


@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_a_checkpoint_is_the_stage_and_is_read_again(
    mode: str, parent: Path, tmp_path: Path
) -> None:
    model = begin(mode, parent)
    fill(model, "two", seed=2)
    model.save_pretrained(tmp_path / "checkpoint")
    names = [stage.name for stage in lineage(tmp_path / "checkpoint").stages]
    assert names == ["one", "two"]
    again = begin(mode, parent)
    assert not torch.allclose(logits(again), logits(model))
    asked, active = trained(again), again.active_adapters
    # A trainer names the first of the active adapters, whichever trains.
    report = again.load_adapter(tmp_path / "checkpoint", active[0])
    assert report.complete
    assert same(weights(again), weights(model))
    assert (trained(again), again.active_adapters) == (asked, active)
    torch.testing.assert_close(
        logits(load(tmp_path / "checkpoint", models.tiny_llama())), logits(model)
    )


def test_another_alpha_is_refused(parent: Path, tmp_path: Path) -> None:
    begin("stack", parent).save_pretrained(tmp_path / "checkpoint")
    other = begin("stack", parent, lora_alpha=6)
    before = weights(other)
    with pytest.raises(StageError, match="lora_alpha: 3 in the checkpoint, 6 in the model"):
        other.load_adapter(tmp_path / "checkpoint", "two")
    assert same(weights(other), before)


def test_another_stage_is_refused(parent: Path, tmp_path: Path) -> None:
    begin("stack", parent).save_pretrained(tmp_path / "checkpoint")
    other = begin("stack", parent, name="three")
    with pytest.raises(StageError, match="one -> two in the checkpoint, one -> three in the model"):
        other.load_adapter(tmp_path / "checkpoint", "three")
