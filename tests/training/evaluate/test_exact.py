"""Answers that are written greedily, against the expected ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.errors import PlanError
from lamina.training.evaluate.exact import same
from tests import models
from tests.ecosystem import texts
from tests.training.data.written import said
from tests.training.evaluate.asked import prepared, score

PROMPTS = [texts.sentence(row, 3 + row % 3) for row in range(6)]


def greedily(model: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest next token, again and again, without a cache."""
    made: list[int] = []
    while len(made) < count:
        with torch.no_grad():
            told = model(input_ids=torch.tensor([ids + made]), use_cache=False).logits[0, -1]
        made.append(int(told.argmax()))
        if made[-1] == texts.tokenizer().eos_token_id:
            break
    return made


def by_hand(model: Any, prompt: str, count: int = 5) -> str:
    tokenizer = texts.tokenizer()
    made = greedily(model, tokenizer(prompt)["input_ids"], count)
    return str(tokenizer.decode(made, skip_special_tokens=True))


def as_talk(prompt: str, answer: str) -> dict[str, Any]:
    """The tests' template says what is said and no more, so that the prompt stays what it is."""
    first = [said("user", prompt), said("assistant", answer), said("user", "w1")]
    return {"messages": first[:2]} if prompt != PROMPTS[0] else {"messages": first}


def as_alpaca(prompt: str, answer: str) -> dict[str, Any]:
    return {"instruction": prompt, "output": answer}


def as_completion(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer}


@pytest.mark.parametrize("row", [as_completion, as_talk, as_alpaca])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_share_of_answers_that_are_as_expected(
    tmp_path: Path, row: Any, batch_size: int
) -> None:
    model = models.tiny_llama()
    answers = [by_hand(model, prompt) for prompt in PROMPTS]
    # Two are expected as they come, but for white space; four otherwise.
    wanted = [f"  {answers[0]}\n", answers[1].replace(" ", "\n\t"), *["w1 w2"] * 4]
    rows = [row(prompt, answer) for prompt, answer in zip(PROMPTS, wanted, strict=True)]
    held = prepared(tmp_path, rows, metric="exact_match", max_new_tokens=5)
    found = score(held, model, batch_size=batch_size)
    assert found.value == pytest.approx(2 / 6)
    assert found.error == pytest.approx((2 / 6 * 4 / 6 / 6) ** 0.5)
    assert (found.metric, found.examples, found.higher_is_better) == ("exact_match", 6, True)


def test_answers_that_end_are_told_from_those_that_are_cut(tmp_path: Path) -> None:
    model = models.tiny_llama()
    tokenizer = texts.tokenizer()
    made = [greedily(model, tokenizer(prompt)["input_ids"], 5) for prompt in PROMPTS]
    # The model's config says that what it writes second after the first prompt is an end.
    end = made[0][1]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    cut = [each[: each.index(end)] if end in each else each for each in made]
    rows = [as_completion(prompt, "w1") for prompt in PROMPTS]
    found = score(prepared(tmp_path, rows, metric="exact_match", max_new_tokens=5), model)
    ended = sum(end in each for each in made)
    assert ended > 0
    assert found.details["ended"] == pytest.approx(ended / 6)
    assert found.details["tokens"] == pytest.approx(sum(map(len, cut)) / 6)


def test_only_white_space_is_passed_over() -> None:
    assert same(" a  b\n", "a b")
    assert not same("ab", "a b")
    assert not same("A b", "a b")
    assert not same("a b.", "a b")


def test_all_that_can_not_be_asked_is_told(tmp_path: Path) -> None:
    rows = [
        {"messages": [said("assistant", "w1")]},
        {"messages": [said("user", texts.sentence(0, 12)), said("assistant", "w1")]},
        {"messages": [said("user", "w1"), said("assistant", "  ")]},
        {"messages": [said("user", "w1"), said("assistant", "w2")]},
    ]
    with pytest.raises(PlanError) as told:
        prepared(tmp_path, rows, metric="exact_match", max_length=10)
    text = str(told.value)
    assert "example 1: the assistant speaks first" in text
    assert "example 2: the prompt has 12 tokens, more than max_length: 10" in text
    assert "example 3: the last answer of the assistant is no text" in text
    assert "example 4" not in text


@pytest.mark.parametrize("row", [{"text": "w1 w2"}, {"prompt": "w1"}])
def test_there_are_prompts_and_answers(tmp_path: Path, row: dict[str, str]) -> None:
    with pytest.raises(PlanError, match=r"there is no (prompt|answer)"):
        prepared(tmp_path, [row], metric="exact_match")
