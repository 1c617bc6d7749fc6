"""Finding out how examples are laid out, and what each method makes of them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset

from lamina.errors import DataError
from lamina.training.data.formats import FORMATS, LEARNS_FROM
from tests.training.data.written import converted, jsonl, read, said

ASKED, ANSWER, BAD = said("user", "Q"), said("assistant", "A"), said("assistant", "B")
TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
# One example of each format.
EXAMPLES: dict[str, dict[str, Any]] = {
    "text": {"text": "t"},
    "messages": {"messages": [ASKED, ANSWER]},
    "sharegpt": {"conversations": TURNS, "system": "S"},
    "alpaca": {"instruction": "Q", "input": "more", "output": "A"},
    "prompt_completion": {"prompt": "Q", "completion": "A"},
    "preference": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "unpaired_preference": {"prompt": "Q", "completion": "A", "label": True},
    "prompt_only": {"prompt": "Q"},
}


def test_there_is_an_example_of_every_format() -> None:
    assert set(EXAMPLES) == set(FORMATS)


@pytest.mark.parametrize(("method", "form"), list(product(LEARNS_FROM, FORMATS)))
def test_a_method_takes_its_formats_and_refuses_all_others(
    tmp_path: Path, method: str, form: str
) -> None:
    path = jsonl(tmp_path / "one.jsonl", [EXAMPLES[form]])
    learns = form in LEARNS_FROM[method]
    # What has a prompt has one for grpo; but a completion never reaches reward functions.
    if learns or (method == "grpo" and form == "preference"):
        pairs = method == "kto" and form == "preference"
        assert len(read(path, method).dataset) == (2 if pairs else 1)
        return
    with pytest.raises(DataError) as error:
        read(path, method)
    assert error.value.cure


@pytest.mark.parametrize(
    ("method", "row", "expected"),
    [
        ("sft", EXAMPLES["sharegpt"], {"messages": [said("system", "S"), ASKED, ANSWER]}),
        ("sft", {"conversations": [ASKED, ANSWER]}, {"messages": [ASKED, ANSWER]}),
        ("sft", {"messages": TURNS}, {"messages": [ASKED, ANSWER]}),
        (
            "sft",
            EXAMPLES["alpaca"],
            {"prompt": [said("user", "Q\nmore")], "completion": [ANSWER]},
        ),
        (
            "sft",
            {"instruction": "Q2", "output": "A", "system": "S", "history": [["Q", "B"]]},
            {
                "prompt": [said("system", "S"), ASKED, BAD, said("user", "Q2")],
                "completion": [ANSWER],
            },
        ),
        (
            "sft",
            {"prompt": [ASKED], "completion": "A"},
            {"prompt": [ASKED], "completion": [ANSWER]},
        ),
        ("sft", {"prompt": "Q", "completion": ANSWER}, {"prompt": [ASKED], "completion": [ANSWER]}),
        # As in UltraFeedback: the answers are whole conversations, the prompt a text.
        (
            "dpo",
            {"prompt": "Q", "chosen": [ASKED, ANSWER], "rejected": [ASKED, BAD], "messages": []},
            {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [BAD]},
        ),
        (
            "dpo",
            {"prompt": [ASKED], "chosen": [ASKED, ANSWER], "rejected": [ASKED, BAD]},
            {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [BAD]},
        ),
        # As LLaMA-Factory has them.
        (
            "dpo",
            {
                "conversations": TURNS[:1],
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
            },
            {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [BAD]},
        ),
        (
            "orpo",
            {"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"},
            {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [BAD]},
        ),
        # As in Anthropic's data: the prompt is what both begin with.
        (
            "dpo",
            {"chosen": "H: Q A: yes it is", "rejected": "H: Q A: yes not"},
            {"prompt": "H: Q A: yes", "chosen": " it is", "rejected": " not"},
        ),
        ("reward", {"chosen": "Q A", "rejected": "Q B"}, {"chosen": "Q A", "rejected": "Q B"}),
        (
            "kto",
            {"prompt": "Q", "completion": "A", "label": "False"},
            {"prompt": "Q", "completion": "A", "label": False},
        ),
        (
            "grpo",
            {"prompt": [ASKED], "answer": 4, "tests": ["a", 1]},
            {"prompt": [ASKED], "answer": 4, "tests": ["a", 1]},
        ),
        ("pt", {"text": "t", "url": "u"}, {"text": "t"}),
    ],
)
def test_what_becomes_of_an_example(
    tmp_path: Path, method: str, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert converted(tmp_path, row, method) == expected


@pytest.mark.parametrize(
    "pair",
    [
        ("H: Q A: yes it is", "H: Q A: yes not"),
        ("same start x", "same start y"),
        ([ASKED, ANSWER], [ASKED, BAD]),
    ],
)
def test_a_prompt_that_both_begin_with_is_the_one_that_trl_finds(tmp_path: Path, pair: Any) -> None:
    row = {"chosen": pair[0], "rejected": pair[1]}
    assert converted(tmp_path, row, "dpo") == trl.extract_prompt(row)


def test_pairs_for_kto_are_a_wanted_and_an_unwanted_answer(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i}", "chosen": f"A{i}", "rejected": f"B{i}"} for i in range(3)]
    made = read(jsonl(tmp_path / "a.jsonl", rows), "kto").dataset
    expected = trl.unpair_preference_dataset(Dataset.from_list(rows))
    assert made.to_list() == [dict(row) for row in expected.select_columns(made.column_names)]


def test_columns_are_renamed_and_what_is_not_read_is_told(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"question": "Q", "best": "A", "prompt": "no", "id": 1}])
    columns = {"prompt": "question", "completion": "best"}
    made = read(path, "sft", columns=columns)
    assert made.dataset.to_list() == [{"prompt": "Q", "completion": "A"}]
    assert made.layout.dropped == ("id",)
    with pytest.raises(DataError) as error:
        read(path, "sft", columns={"promt": "question", "completion": "bst"})
    assert "'promt' is the name of no column of a format; did you mean 'prompt'?" in str(
        error.value
    )
    assert "'bst': there is no such column; did you mean 'best'?" in str(error.value)


def test_a_format_that_is_said_wins_over_what_is_found(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [EXAMPLES["unpaired_preference"]])
    made = read(path, "sft", format="prompt_completion")
    assert made.dataset.to_list() == [{"prompt": "Q", "completion": "A"}]
    assert made.layout.dropped == ("label",)
    with pytest.raises(
        DataError, match="isn't laid out as alpaca, which needs instruction, output"
    ):
        read(path, "sft", format="alpaca")


def test_what_is_unknown_is_shown_with_what_would_do(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"instructions": "Q" * 99, "output": "A"}])
    with pytest.raises(DataError) as error:
        read(path, "sft")
    told = str(error.value)
    assert "its columns: instructions, output" in told
    assert '{instructions: "QQQ' in told
    assert "QQQ..., output" in told
    assert "as alpaca: instruction, output" in told
    assert error.value.cure == "columns: {instruction: instructions}"
    path = jsonl(tmp_path / "b.jsonl", [{"question": "Q", "Reply": "A"}])
    with pytest.raises(DataError) as error:
        read(path, "sft")
    assert error.value.cure == "columns: {prompt: question, completion: Reply}"


def test_what_can_be_two_things_is_not_guessed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{**EXAMPLES["text"], **EXAMPLES["messages"]}])
    with pytest.raises(DataError, match="can be read as messages, text"):
        read(path, "sft")
    assert read(path, "pt").dataset.column_names == ["text"]
    assert read(path, "sft", format="text").dataset.column_names == ["text"]


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"messages": [{"role": "user"}, ANSWER]}, "message 1 of messages has no content"),
    ("sft", {"messages": [ASKED, {"role": "assistant", "content": None}]}, "has no content"),
    ("sft", {"messages": [ASKED, {"content": "A"}]}, "message 2 of messages has no role"),
    ("sft", {"messages": [ASKED, said("clerk", "A")]}, "the role 'clerk'; known are system"),
    ("sft", {"messages": []}, "messages is empty"),
    ("sft", {"messages": None}, "conversations is missing"),
    ("sft", {"messages": [ASKED]}, "the assistant says nothing"),
    ("sft", {"messages": [ASKED, {**ANSWER, "weight": 0}]}, "'weight', which the trainers don't"),
    ("sft", {"messages": [ASKED, {**ANSWER, "content": [{"type": "image"}]}]}, "holds 'image'"),
    ("sft", {"messages": [ASKED, ANSWER], "tools": "{"}, "tools is no JSON"),
    ("sft", {"messages": [said("system", "T"), ANSWER], "system": "S"}, "system differs"),
    ("sft", {"instruction": "", "output": "A"}, "instruction is empty"),
    ("sft", {"instruction": "Q", "output": None}, "output is missing"),
    ("sft", {"instruction": "Q", "output": "A", "history": [["Q"]]}, "turn 1 of history"),
    ("sft", {"prompt": "Q", "completion": " "}, "completion is empty"),
    ("sft", {"prompt": [ASKED], "completion": "A"}, "prompt is messages, unlike"),
    ("dpo", {"prompt": "Q", "chosen": "A", "rejected": "A"}, "the same"),
    ("dpo", {"prompt": "Q", "chosen": "A", "rejected": ""}, "rejected is empty"),
    ("kto", {"prompt": "Q", "completion": "A", "label": "good"}, "label is 'good'"),
    ("grpo", {"prompt": [ASKED, ANSWER]}, "ends with what the assistant says"),
    ("pt", {"text": "  "}, "text is empty"),
    ("pt", {"text": 3}, "text is int 3, and no text"),
]
WHOLE = {
    "messages": EXAMPLES["messages"],
    "instruction": EXAMPLES["alpaca"],
    "chosen": EXAMPLES["preference"],
    "label": EXAMPLES["unpaired_preference"],
    "completion": EXAMPLES["prompt_completion"],
    "text": EXAMPLES["text"],
    "prompt": EXAMPLES["prompt_only"],
}


@pytest.mark.parametrize(("method", "row", "told"), BROKEN)
def test_broken_examples(tmp_path: Path, method: str, row: dict[str, Any], told: str) -> None:
    whole = next(example for key, example in WHOLE.items() if key in row)
    extra = {"tools": None} if "tools" in row else {}
    path = jsonl(tmp_path / "a.jsonl", [{**whole, **extra}, row])
    with pytest.raises(DataError) as error:
        read(path, method)
    assert "1 broken example (" in error.value.what
    (fault,) = error.value.faults
    assert fault.startswith("line 2: ")
    assert told in fault


def test_all_broken_examples_are_counted_and_the_first_told(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "t"}, *([{"text": ""}] * 2_500)])
    with pytest.raises(DataError) as error:
        read(path, "pt")
    assert "2,500 broken examples" in error.value.what
    assert len(error.value.faults) == 6
    assert error.value.faults[-1] == "and 2,495 more"


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"holds no example"):
        read(tmp_path / "a.jsonl", "pt")


def test_messages_keep_what_else_they_have(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {}}}]}
    row = {"messages": [ASKED, call, said("tool", "4"), ANSWER], "tools": [{"name": "add"}]}
    made = converted(tmp_path, row, "sft")
    assert made["messages"] == [ASKED, {**call, "content": ""}, said("tool", "4"), ANSWER]
    assert made["tools"] == '[{"name": "add"}]'
    parts = {"role": "user", "content": [{"type": "text", "text": "Q"}, {"text": "!"}]}
    made = converted(tmp_path, {"messages": [parts, ANSWER]}, "sft")
    assert made["messages"] == [said("user", "Q!"), ANSWER]


def test_names_that_reward_functions_never_see_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "A"}])
    with pytest.raises(DataError, match="completion doesn't reach reward functions"):
        read(path, "grpo")
    made = read(path, "grpo", columns={"answer": "completion"})
    assert made.dataset.to_list() == [{"prompt": "Q", "answer": "A"}]


def test_columns_of_reward_functions_may_be_of_several_kinds(tmp_path: Path) -> None:
    values = [1, 2.5], [None, "a"], ["x", ["y"]], [{"a": 1}, {"b": [2]}], [True, None]
    rows = [
        {"prompt": "Q", **{f"c{i}": pair[row] for i, pair in enumerate(values)}} for row in (0, 1)
    ]
    assert read(jsonl(tmp_path / "a.jsonl", rows), "grpo").dataset.to_list() == rows


def test_values_that_fit_no_table_are_an_error_of_the_data(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "answer": 1 << 70}])
    with pytest.raises(DataError, match="no table can hold"):
        read(path, "grpo")


def test_a_first_example_that_is_broken_hides_no_format(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": []}, EXAMPLES["messages"]])
    with pytest.raises(DataError) as error:
        read(path, "sft")
    assert error.value.faults == ("line 1: messages is empty",)
