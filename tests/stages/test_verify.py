"""Honest stages are proved, in every dtype, mode and kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lamina import save_stage
from lamina.checkpoint.probe import answers_of, ask
from lamina.demo.run import SHIPPED_BASE
from lamina.stages import verify
from tests import models
from tests.stages.chains import (
    Snapshot,
    answer,
    llama_lora,
    run_chain,
    run_stage,
)
from tests.stages.verifying import CHAT, DOMAIN, demo_stage, qlora_stage, verdicts, words


def test_an_honest_stage_is_proved(runs: Path) -> None:
    report = verify(runs / "chat", models.tiny_llama(), tokenizer=words())
    assert report.passed
    assert report.proved
    assert report.causes == ()
    assert report.notes == ()
    assert set(verdicts(report).values()) == {"passed"}
    assert report.stages == ("domain", "chat")
    answers, base = report.answers, report.base_answers
    assert answers is not None
    assert base is not None
    assert answers.top1_agreement == base.top1_agreement == 1.0
    assert answers.kl is not None
    assert answers.kl < 1e-6
    assert answers.tolerance is not None
    assert answers.max_difference < answers.tolerance / 5
    assert base.max_difference == 0.0
    assert report.effect is not None
    assert report.effect.size == pytest.approx(1, abs=1e-3)


def test_the_answers_are_those_of_the_model_that_was_saved(tmp_path: Path) -> None:
    model = run_stage(tmp_path / "sft", DOMAIN)
    record = save_stage(model, tmp_path / "sft")
    probe = record.newest.probe
    assert probe is not None
    here, alone = ask(model), ask(models.tiny_llama())
    assert here is not None
    assert alone is not None
    assert (probe.chain, probe.base) == (answers_of(here), answers_of(alone))
    largest = answer(model).abs().max()
    assert 0.5 * float(largest) < probe.chain.largest < 2 * float(largest)


def on_disk(path: Path) -> Path:
    """The demo's base, whose weights were trained."""
    shutil.copytree(SHIPPED_BASE, path)
    return path


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("opened", [torch.float32, torch.bfloat16, torch.float16])
def test_honest_in_every_dtype(tmp_path: Path, saved: torch.dtype, opened: torch.dtype) -> None:
    path = demo_stage(tmp_path, saved)
    report = verify(path, dtype=opened, attn_implementation="eager")
    assert report.proved, report
    assert report.answers is not None
    assert report.answers.tolerance is not None
    assert report.answers.max_difference <= report.answers.tolerance / 3
    coarsest = max((saved, opened), key=lambda dtype: torch.finfo(dtype).eps)
    assert report.answers.judged_by == str(coarsest).removeprefix("torch.")


def test_honest_in_4_bits(tmp_path: Path) -> None:
    path = qlora_stage(tmp_path)
    # As it was saved, without being told.
    report = verify(path)
    assert report.proved, report
    assert report.answers is not None
    assert report.answers.judged_by == "bitsandbytes nf4 in float32"
    assert report.answers.tolerance is not None
    dense = verify(path, load_in_4bit=False)
    assert dense.proved, dense
    assert dense.answers is not None
    assert dense.answers.judged_by == "bitsandbytes nf4 against dense"
    assert dense.answers.tolerance is None
    assert dense.answers.kl is not None
    assert 0 < dense.answers.kl < 0.1
    assert dense.effect is not None
    assert dense.effect.size == pytest.approx(1, abs=0.2)


def test_honest_from_dense_to_4_bits(tmp_path: Path) -> None:
    path = demo_stage(tmp_path)
    report = verify(path, load_in_4bit=True)
    assert report.proved, report
    assert report.answers is not None
    assert report.answers.judged_by == "dense against bitsandbytes nf4"
    assert any("instead of dense" in note for note in report.notes)


@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_honest_in_every_mode(tmp_path: Path, mode: str) -> None:
    config = None if mode == "continue" else CHAT
    _, path = run_chain(tmp_path, [("domain", None, DOMAIN), ("chat", mode, config)])
    report = verify(path, models.tiny_llama())
    assert report.proved, report
    assert report.base_answers is not None
    assert report.base_answers.max_difference == 0.0


def test_a_base_that_was_folded_for_good_has_no_answers_of_its_own(tmp_path: Path) -> None:
    run_stage(tmp_path / "domain", DOMAIN)
    run_stage(
        tmp_path / "chat", CHAT, parent=tmp_path / "domain", mode="merge", keep_unfolded=False
    )
    report = verify(tmp_path / "chat", models.tiny_llama())
    assert report.proved
    assert report.base_answers is None
    assert report.effect is not None
    assert report.effect.size == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_honest_with_every_kind_of_adapter(tmp_path: Path, changes: dict[str, Any]) -> None:
    run_stage(tmp_path / "sft", llama_lora(**changes))
    report = verify(tmp_path / "sft", models.tiny_llama())
    assert report.proved, report
    assert report.base_answers is not None
    assert report.base_answers.passed


def test_a_new_head_is_drawn_anew_each_time_so_the_base_alone_is_not_asked(tmp_path: Path) -> None:
    config = llama_lora(target_modules=["query"])
    config.task_type = "SEQ_CLS"
    run_stage(tmp_path / "sft", config, build=models.tiny_bert_classifier)
    base = models.tiny_bert_classifier()
    nn.init.normal_(base.classifier.weight)
    report = verify(tmp_path / "sft", base)
    assert report.proved, report
    assert report.base_answers is None


def test_a_model_that_takes_no_tokens_is_not_proved(tmp_path: Path) -> None:
    config = llama_lora(target_modules=["up"])
    config.task_type = None
    run_stage(tmp_path / "sft", config, build=models.perceptron)
    report = verify(tmp_path / "sft", models.perceptron())
    assert report.passed
    assert not report.proved
    (answers,) = (check for check in report.checks if check.name == "answers")
    assert "doesn't take tokens" in answers.detail
    wrong = verify(tmp_path / "sft", models.perceptron(seed=1))
    assert "another base" in [cause.kind for cause in wrong.causes]


def test_the_base_comes_back_as_it_was(runs: Path) -> None:
    base = models.tiny_llama()
    base.model.layers[0].train()
    before = Snapshot(base)
    verify(runs / "chat", base)
    before.check()
    verify(runs / "chat", base)
