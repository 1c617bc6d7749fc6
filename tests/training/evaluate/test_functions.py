"""Functions of the user's are called as reward functions are, once, and give one number each."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lamina.errors import LaminaError, PlanError
from lamina.training.evaluate.measuring import measure
from tests import models
from tests.ecosystem import texts
from tests.training.data.written import said
from tests.training.evaluate.asked import prepared, score
from tests.training.evaluate.test_exact import PROMPTS, by_hand

ROWS = [
    {"prompt": prompt, "completion": f" w{row}", "level": row} for row, prompt in enumerate(PROMPTS)
]


class Heard:
    """What the functions of a module were called with, and what they give."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.gives: Any = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0]

    def all_of_it(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        self.calls.append({"prompts": prompts, "completions": completions, **columns})
        return self.gives

    def answers_alone(self, completions: Any, answer: Any) -> Any:
        self.calls.append({"completions": completions, "answer": answer})
        return self.gives

    def wants_more(self, completions: Any, anwser: Any, trainer_state: Any) -> Any:
        raise AssertionError

    def raising(self, **told: Any) -> Any:
        raise KeyError("level 9")

    async def waiting(self, **told: Any) -> Any:
        return self.gives


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    module, made = ModuleType("own_scores"), Heard()
    for name in ("all_of_it", "answers_alone", "wants_more", "raising", "waiting"):
        setattr(module, name, getattr(made, name))
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_scores", module)
    return made


def asked(folder: Path, function: str, rows: Any = ROWS, **settings: Any) -> Any:
    told = {"metric": f"own_scores:{function}", "max_new_tokens": 5, **settings}
    return prepared(folder, rows, **told)


def test_it_is_called_once_with_answers_and_columns(tmp_path: Path, heard: Heard) -> None:
    model = models.tiny_llama()
    found = score(asked(tmp_path, "all_of_it"), model, batch_size=4)
    (call,) = heard.calls
    assert call["prompts"] == PROMPTS
    assert call["completions"] == [by_hand(model, prompt) for prompt in PROMPTS]
    assert call["answer"] == [row["completion"] for row in ROWS]
    assert call["level"] == list(range(6))
    decoded = [texts.tokenizer().decode(each) for each in call["completion_ids"]]
    assert [each.removesuffix(" </s>") for each in decoded] == call["completions"]
    values = torch.tensor(heard.gives, dtype=torch.float64)
    assert found.value == pytest.approx(16 / 6)
    assert found.error == pytest.approx(float(values.std() / 6**0.5))
    assert (found.metric, found.examples) == ("own_scores:all_of_it", 6)
    assert found.higher_is_better


def test_conversations_are_messages_as_for_rewards(tmp_path: Path, heard: Heard) -> None:
    rows = [
        {"messages": [said("user", "w1"), said("assistant", f"w{row}")], "answer": f"own {row}"}
        for row in range(6)
    ]
    score(asked(tmp_path, "all_of_it", rows, higher_is_better=False), models.tiny_llama())
    (call,) = heard.calls
    assert call["prompts"] == [[said("user", "w1")]] * 6
    assert [[each["role"] for each in talk] for talk in call["completions"]] == [["assistant"]] * 6
    # A column of the data's own goes before the answer that a conversation ends in.
    assert call["answer"] == [f"own {row}" for row in range(6)]


def test_data_for_grpo_has_its_columns(tmp_path: Path, heard: Heard) -> None:
    rows = [{"prompt": prompt, "solution": [row, "x"]} for row, prompt in enumerate(PROMPTS)]
    score(asked(tmp_path, "all_of_it", rows), models.tiny_llama())
    (call,) = heard.calls
    assert call["solution"] == [[row, "x"] for row in range(6)]
    assert "answer" not in call


def test_a_function_takes_what_it_names(tmp_path: Path, heard: Heard) -> None:
    score(asked(tmp_path, "answers_alone"), models.tiny_llama())
    assert heard.calls[0]["answer"] == [row["completion"] for row in ROWS]


@pytest.mark.parametrize("given", [torch.tensor([1.0] * 6), (True,) * 6, 1, torch.tensor(1.0)])
def test_numbers_of_any_kind_are_taken(tmp_path: Path, heard: Heard, given: Any) -> None:
    heard.gives = given
    found = score(asked(tmp_path, "all_of_it", higher_is_better=False), models.tiny_llama())
    single = not isinstance(given, tuple) and torch.as_tensor(given).dim() == 0
    assert (found.value, found.error) == (1.0, None if single else 0.0)
    assert not found.higher_is_better


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([1.0] * 5, "5 numbers for 6 answers"),
        ([1.0, float("nan"), None, 4.0, "x", float("inf")], "number 2 is nan"),
        (None, "it gave NoneType"),
        ("6", "it gave str"),
        (float("inf"), "number 1 is inf"),
    ],
)
def test_what_is_no_score_is_refused(tmp_path: Path, heard: Heard, given: Any, told: str) -> None:
    heard.gives = given
    held = asked(tmp_path, "all_of_it")
    with pytest.raises(LaminaError, match=told) as error:
        score(held, models.tiny_llama())
    assert "6 finite numbers" in (error.value.cure or "")


def test_a_function_that_fails_is_named(tmp_path: Path, heard: Heard) -> None:
    held = asked(tmp_path, "raising")
    with pytest.raises(PlanError, match=r"own_scores:raising ends in KeyError\('level 9'\)"):
        score(held, models.tiny_llama())


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("wants_more", "it wants 'anwser'; did you mean 'answer'?"),
        ("wants_more", "it wants 'trainer_state'"),
        ("all_of_them", "did you mean 'all_of_it'?"),
        ("number", "has no function 'number'"),
        ("waiting", "it is async"),
    ],
)
def test_what_can_not_be_called_is_told_first(
    tmp_path: Path, heard: Heard, function: str, told: str
) -> None:
    with pytest.raises(PlanError) as error:
        asked(tmp_path, function)
    assert told in str(error.value)


def test_a_module_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_scores.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("broken_scores:one", "no_such_scores:one"):
        with pytest.raises(PlanError, match=rf"{name.partition(':')[0]}.*(imported|importing)"):
            prepared(tmp_path, ROWS, metric=name)


def test_columns_that_lamina_gives_are_not_taken_from_data(tmp_path: Path, heard: Heard) -> None:
    rows = [{**row, "completion_ids": [1]} for row in ROWS]
    with pytest.raises(PlanError, match="column completion_ids"):
        asked(tmp_path, "all_of_it", rows)


def test_scores_depend_on_the_source_of_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    hashes = []
    for number in (1, 2):
        (tmp_path / f"scores_{number}.py").write_text(f"def one(completions):\n  return {number}\n")
        held = prepared(tmp_path, ROWS, metric=f"scores_{number}:one")
        hashes.append(held.material.content)
        assert score(held, models.tiny_llama()).value == number
    assert hashes[0] != hashes[1]


def test_a_reward_model_writes_nothing(tmp_path: Path, heard: Heard) -> None:
    held = asked(tmp_path, "all_of_it")
    assert measure(held, models.tiny_llama(), texts.tokenizer(), head="reward") is None
