"""Merging models of other kinds, and what happens when the file can't be trusted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lamina import LoraConfig, begin_stage, get_peft_model, load, save_stage
from lamina.checkpoint.probe import Outputs, ask
from lamina.errors import CheckpointError
from lamina.stages.merged import save_merged
from tests import adapters, models
from tests.stages.chains import fill_trainable


def saved(base: Any, directory: Path, **config: Any) -> tuple[Path, Path]:
    """A base and a filled adapter over it, both on disk."""
    base.save_pretrained(directory / "base")
    base.name_or_path = str(directory / "base")
    model = get_peft_model(base, LoraConfig(r=4, **config))
    adapters.fill(model)
    model.save_pretrained(directory / "adapter")
    return directory / "adapter", directory / "base"


def test_a_classifier_takes_its_new_head_along(tmp_path: Path) -> None:
    base = models.tiny_bert_classifier()
    adapter, _ = saved(base, tmp_path, target_modules=["query"], task_type="SEQ_CLS")
    expected = adapters.logits(load(adapter))
    report = save_merged(adapter, tmp_path / "out")
    assert report.model_class == "BertForSequenceClassification"
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert (adapters.logits(merged) - expected).abs().max() < 1e-5
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert not torch.equal(merged.classifier.weight, plain.classifier.weight)


def test_an_encoder_decoder_is_compared_too(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0
    )
    base = T5ForConditionalGeneration(config).eval()
    adapter, _ = saved(base, tmp_path, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    report = save_merged(adapter, tmp_path / "out")
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-4
    assert report.max_logit is not None
    assert report.max_logit > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_stage_with_new_tokens_is_merged_into_the_smaller_base(
    streaming: bool, tied: bool, tmp_path: Path
) -> None:
    models.tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = list(range(models.VOCABULARY, models.VOCABULARY + 4))
    base.resize_token_embeddings(rows[-1] + 1, mean_resizing=False)
    tables = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=dict.fromkeys(tables, rows)
    )
    model = begin_stage(base, name="sft", config=config)
    fill_trainable(model)
    save_stage(model, tmp_path / "sft")
    save_merged(tmp_path / "sft", tmp_path / "out", streaming=streaming)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (adapters.logits(merged) - adapters.logits(model.eval())).abs().max() < 1e-5


@pytest.mark.parametrize("streaming", [True, False])
def test_a_model_that_answers_otherwise_leaves_nothing(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = saved(
        models.tiny_llama(), tmp_path, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    answers = []

    def wrong_the_second_time(model: Any, tokens: Any = None) -> Outputs | None:
        answers.append(ask(model, tokens))
        assert answers[0] is not None
        values = answers[0].values * len(answers)
        return dataclasses.replace(answers[0], values=values)

    monkeypatch.setattr("lamina.stages.merged_in_memory.ask", wrong_the_second_time)
    monkeypatch.setattr("lamina.stages.merged_verify.ask", wrong_the_second_time)
    with pytest.raises(CheckpointError, match="doesn't answer as base and adapter"):
        save_merged(adapter, out, force=True, verify="model", streaming=streaming)
    assert len(answers) == 2
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "old"
