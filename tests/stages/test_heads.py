"""A stage with another head than the one before: a reward model on a language model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import lamina
from lamina.errors import MismatchWarning, StageError
from tests import models
from tests.stages.chains import WEIGHTS, fill_trainable, llama_lora

LABELS = 1


def classifier(folder: Path, labels: int = LABELS) -> Any:
    """The base with a new head, different each time."""
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(folder, num_labels=labels).eval()


def score_lora(**changes: Any) -> lamina.LoraConfig:
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}
    return lamina.LoraConfig(task_type="SEQ_CLS", **settings | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a stage of a language model on it, and a reward stage on that."""
    made = tmp_path_factory.mktemp("heads")
    models.tiny_llama().save_pretrained(made / "base")
    language = transformers.AutoModelForCausalLM.from_pretrained(made / "base")
    model = lamina.begin_stage(language, name="chat", config=llama_lora())
    fill_trainable(model)
    lamina.save_stage(model, made / "chat")
    return made


@pytest.fixture(scope="module")
def judge(folder: Path) -> tuple[Path, torch.Tensor]:
    """The reward stage, begun without a word, and what it answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lamina.begin_stage(
            classifier(folder / "base"),
            name="judge",
            parent=folder / "chat",
            mode="stack",
            config=score_lora(),
        ).eval()
    fill_trainable(model, seed=3)
    lamina.save_stage(model, folder / "judge")
    return folder / "judge", model(input_ids=models.token_ids()).logits.detach()


def test_it_loads_by_its_path_with_its_own_head(judge: tuple[Path, torch.Tensor]) -> None:
    path, expected = judge
    assert expected.shape == (2, LABELS)
    assert load_file(path / WEIGHTS)["base_model.model.score.weight"].shape[0] == LABELS
    for model in (
        lamina.load(path),
        lamina.load(path, path.parent / "base"),
        lamina.AutoPeftModel.from_pretrained(path),
        lamina.AutoPeftModelForSequenceClassification.from_pretrained(path),
    ):
        answer = model.eval()(input_ids=models.token_ids()).logits
        torch.testing.assert_close(answer, expected)


def test_it_is_verified_by_its_path(judge: tuple[Path, torch.Tensor]) -> None:
    report = lamina.verify(judge[0])
    report.raise_if_failed()
    assert report.answers is not None
    assert report.answers.max_difference == 0


def test_real_peft_opens_it(judge: tuple[Path, torch.Tensor]) -> None:
    path, expected = judge
    theirs = peft.PeftModel.from_pretrained(classifier(path.parent / "base"), str(path))
    torch.testing.assert_close(theirs(input_ids=models.token_ids()).logits, expected)


def test_what_the_caller_says_of_the_head_is_stronger(judge: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(lamina.LaminaError, match="score"):
        lamina.load(judge[0], num_labels=3)


@pytest.mark.parametrize("mode", ["continue", "stack"])
def test_the_next_one_goes_on_with_its_head(
    mode: str, judge: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    path, expected = judge
    model = lamina.begin_stage(
        classifier(path.parent / "base"),
        name="again",
        parent=path,
        mode=mode,
        config=None if mode == "continue" else score_lora(),
    ).eval()
    torch.testing.assert_close(model(input_ids=models.token_ids()).logits, expected)
    lamina.save_stage(model, tmp_path / "again")
    again = lamina.load(tmp_path / "again")
    torch.testing.assert_close(again(input_ids=models.token_ids()).logits, expected)


def test_another_head_that_nothing_trains_is_told(folder: Path) -> None:
    with pytest.warns(MismatchWarning, match="score"):
        lamina.begin_stage(
            classifier(folder / "base"),
            name="other",
            parent=folder / "chat",
            mode="stack",
            config=llama_lora(),
        )


def test_a_head_that_the_chain_has_trained_is_not_given_up(folder: Path, tmp_path: Path) -> None:
    language = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    config = llama_lora(modules_to_save=["lm_head"])
    model = lamina.begin_stage(language, name="words", config=config)
    fill_trainable(model)
    lamina.save_stage(model, tmp_path / "words")
    with pytest.raises((StageError, lamina.LaminaError), match="lm_head"):
        lamina.begin_stage(
            classifier(folder / "base"),
            name="judge",
            parent=tmp_path / "words",
            mode="stack",
            config=score_lora(),
        )
