"""`lamina merge`: the saved model answers as base and adapter do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lamina import LoraConfig, begin_stage, load, save_stage
from tests import adapters, models
from tests.cli.made import lamina


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved base with a tokenizer."""
    models.tiny_llama().save_pretrained(tmp_path / "base")
    words = {f"w{index}": index for index in range(models.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def stage(base: Path, tmp_path: Path) -> Path:
    """A stage over it, every weight of which differs from zero."""
    model = begin_stage(AutoModelForCausalLM.from_pretrained(base), name="sft", config=CONFIG)
    adapters.fill(model, "sft")
    save_stage(model, tmp_path / "sft")
    return tmp_path / "sft"


CONFIG = LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
)


def test_a_base_that_is_not_there(stage: Path, tmp_path: Path) -> None:
    done = lamina("merge", stage, "--base", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "no such directory" in done.stderr
    (tmp_path / "empty").mkdir()
    done = lamina("merge", stage, "--base", tmp_path / "empty", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "can't be opened" in done.stderr
    assert not (tmp_path / "out").exists()


def answers_of(directory: Path) -> torch.Tensor:
    return adapters.logits(AutoModelForCausalLM.from_pretrained(directory).eval())


def test_the_saved_model_answers_as_base_and_adapter(
    stage: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "merged"
    done = lamina("merge", stage, "--base", base, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    expected = adapters.logits(load(stage, str(base)))
    assert (answers_of(out) - expected).abs().max() < 1e-5
    assert told["max_logit_difference"] < 1e-5 < told["max_logit"]
    assert (answers_of(base) - expected).abs().max() > 1e-2
    assert told["dtype"] == "float32"
    assert told["tokenizer"] == str(base)
    assert told["files"] == {file.name: file.stat().st_size for file in out.iterdir()}
    assert "tokenizer.json" in told["files"]
    assert not list(out.glob("adapter*"))


def test_finds_the_base_on_record_and_tells_what_it_saved(stage: Path, tmp_path: Path) -> None:
    done = lamina("merge", stage, "-o", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert "22,688 parameters, float32" in done.stdout
    assert "largest difference" in done.stdout


def test_is_rounded_once_to_the_dtype_that_is_asked_for(stage: Path, tmp_path: Path) -> None:
    assert lamina("merge", stage, "-o", tmp_path / "full").exit_code == 0
    done = lamina("merge", stage, "-o", tmp_path / "half", "--dtype", "bfloat16", "--json")
    assert json.loads(done.stdout)["dtype"] == "bfloat16"
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full").state_dict()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").state_dict()
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


def test_a_half_precision_base_can_be_widened(stage: Path, base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    done = lamina("merge", stage, "-o", tmp_path / "wide", "--dtype", "float32", "--json")
    assert json.loads(done.stdout)["dtype"] == "float32"
    # The base's weights are widened exactly, and the sum is not rounded to bfloat16.
    expected = load(stage, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (answers_of(tmp_path / "wide") - adapters.logits(expected)).abs().max() < 1e-5


def test_does_not_write_over_what_is_there_unless_asked(stage: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "pytorch_model.bin").write_text("old")
    (out / "notes.txt").write_text("mine")
    done = lamina("merge", stage, "-o", out)
    assert done.exit_code == 2
    assert "'notes.txt'" in done.stderr
    assert sorted(file.name for file in out.iterdir()) == ["notes.txt", "pytorch_model.bin"]
    assert lamina("merge", stage, "-o", out, "--force").exit_code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "pytorch_model.bin").exists()
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("place", ["sft", "base"])
def test_never_writes_over_the_adapter_or_the_base(stage: Path, tmp_path: Path, place: str) -> None:
    before = {file.name: file.read_bytes() for file in (tmp_path / place).iterdir()}
    done = lamina("merge", stage, "-o", tmp_path / place, "--force")
    assert done.exit_code == 2
    assert "would be overwritten" in done.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / place).iterdir()} == before


def test_weights_that_are_not_finite_leave_nothing_behind(base: Path, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(base).half()
    half.save_pretrained(base)
    model = begin_stage(half.float(), name="bad", config=CONFIG)
    # More than half precision can hold, and finite until it is rounded.
    adapters.fill(model, "bad", size=1e4)
    save_stage(model, tmp_path / "bad")
    for way in ([], ["--in-memory"]):
        done = lamina("merge", tmp_path / "bad", "--base", base, "-o", tmp_path / "merged", *way)
        assert done.exit_code == 2
        assert "NaN or Inf would come out" in done.stderr
        assert not (tmp_path / "merged").exists()


def test_another_base_is_refused_unless_asked(stage: Path, tmp_path: Path) -> None:
    models.tiny_llama(intermediate_size=96).save_pretrained(tmp_path / "other")
    done = lamina("merge", stage, "--base", tmp_path / "other", "-o", tmp_path / "merged")
    assert done.exit_code == 2
    assert "another base" in done.stderr
    assert not (tmp_path / "merged").exists()
