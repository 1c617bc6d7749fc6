"""Stages whose update is no sum of ranks: DoRA and aLoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import lamina
from lamina.config import LoraConfig
from lamina.errors import CheckpointError, StageError
from lamina.model import PeftModel
from lamina.stages.merged import save_merged
from tests import models
from tests.adapters import WEIGHTS, fill, logits, trained

METHODS: dict[str, dict[str, Any]] = {
    "Dora": {"use_dora": True},
    "ALora": {"alora_invocation_tokens": [5, 6]},
}


def config(**more: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    return LoraConfig(task_type="CAUSAL_LM", **settings | {"rank_pattern": {"up_proj": 2}} | more)


def begun(name: str, parent: Path | None = None, mode: str | None = None, **more: Any) -> PeftModel:
    own = None if mode == "continue" else config(**more)
    return lamina.begin_stage(
        models.tiny_llama(), name=name, parent=parent, mode=mode, config=own
    ).eval()


def saved(path: Path, **more: Any) -> PeftModel:
    model = begun("first", **more)
    fill(model, "first", seed=3)
    lamina.save_stage(model, path)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_one_stage_is_a_plain_adapter(method: str, tmp_path: Path) -> None:
    wanted = logits(saved(tmp_path / "first", **METHODS[method]))
    opened = peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "first").eval()
    torch.testing.assert_close(logits(opened), wanted)
    assert torch.equal(logits(lamina.load(tmp_path / "first", models.tiny_llama())), wanted)
    magnitudes = [key for key in load_file(tmp_path / "first" / WEIGHTS) if "magnitude" in key]
    assert len(magnitudes) == (4 if method == "Dora" else 0)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_continued_twice_where_it_was_left(method: str, tmp_path: Path) -> None:
    wanted = logits(saved(tmp_path / "0", **METHODS[method]))
    for step in (1, 2):
        model = begun(f"again{step}", tmp_path / str(step - 1), "continue")
        assert torch.equal(logits(model), wanted)
        assert any("magnitude" in name for name in trained(model)) == (method == "Dora")
        fill(model, f"again{step}", seed=step)
        wanted = logits(model)
        record = lamina.save_stage(model, tmp_path / str(step))
    assert [stage.name for stage in record.stages] == ["first", "again1", "again2"]
    assert torch.equal(logits(lamina.load(tmp_path / "2", models.tiny_llama())), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_plain_adapter_of_peft_is_continued(tmp_path: Path) -> None:
    settings = peft.LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    theirs = peft.get_peft_model(models.tiny_llama(), settings).eval()
    theirs.save_pretrained(tmp_path / "plain")
    model = begun("on", tmp_path / "plain", "continue")
    torch.testing.assert_close(logits(model), logits(theirs))


@pytest.mark.parametrize("mode", ["stack", "merge"])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_laid_neither_under_nor_over_another(method: str, mode: str, tmp_path: Path) -> None:
    saved(tmp_path / "special", **METHODS[method])
    saved(tmp_path / "plain")
    cases = (("special", {}, "first"), ("plain", METHODS[method], "next"))
    for parent, own, culprit in cases:
        with pytest.raises(StageError) as caught:
            begun("next", tmp_path / parent, mode, **own)
        said = f"update: stage {culprit!r} is {method}, whose update is no sum of ranks"
        assert [fault for fault in caught.value.faults if fault.startswith(said)]
        assert "lamina merge PARENT -o MERGED" in str(caught.value)


def test_what_the_refusal_advises_works(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path / "base")
    wanted = logits(saved(tmp_path / "first", use_dora=True))
    save_merged(tmp_path / "first", tmp_path / "merged", base=str(tmp_path / "base"))
    base = type(models.tiny_llama()).from_pretrained(tmp_path / "merged").eval()
    next_stage = lamina.begin_stage(base, name="next", config=config(use_dora=True)).eval()
    torch.testing.assert_close(logits(next_stage), wanted)


def test_a_file_with_magnitudes_and_several_stages_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "first")
    model = begun("second", tmp_path / "first", "stack")
    model.stage = type(model.stage)(
        **{**vars(model.stage), "config": config(use_dora=True).to_dict()}
    )
    with pytest.raises(CheckpointError, match="can't share one file"):
        lamina.save_stage(model, tmp_path / "second")
    assert not (tmp_path / "second").exists()
