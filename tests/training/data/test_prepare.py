"""Mixing by weight, holding out, and what a stage's trainer is given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from lamina.errors import DataError
from lamina.training.data import StageData, prepare, read_template
from lamina.training.plan.settings import Settings
from tests.ecosystem import texts
from tests.training.data.written import jsonl, said

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} "
    "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def prepared(tokenizer: Any = None, seed: int = 0, **settings: Any) -> StageData:
    tokenizer = texts.tokenizer() if tokenizer is None else tokenizer
    return prepare(Settings(**settings), tokenizer=tokenizer, seed=seed)


def words(folder: Path, name: str, count: int) -> str:
    rows = [{"text": f"{name} {number}"} for number in range(count)]
    return str(jsonl(folder / f"{name}.jsonl", rows))


def talks(folder: Path, count: int = 3) -> str:
    rows = [
        {"messages": [said("user", f"w{number}"), said("assistant", "w9")]}
        for number in range(count)
    ]
    return str(jsonl(folder / "talks.jsonl", rows))


def named(dataset: Any) -> Counter[str]:
    return Counter(text.split()[0] for text in dataset["text"])


def test_without_weights_every_example_comes_once(tmp_path: Path) -> None:
    data = prepared(method="pt", datasets=[words(tmp_path, "a", 3), words(tmp_path, "b", 2)])
    assert data.train["text"] == ["a 0", "a 1", "a 2", "b 0", "b 1"]
    assert (data.rows, data.columns, data.evaluation) == (5, ("text",), None)
    assert [(each.rows, each.share) for each in data.sources] == [(3, 0.6), (2, 0.4)]


def test_weights_are_shares_of_an_epoch_that_ends_when_all_have_come(tmp_path: Path) -> None:
    sources = [
        {"path": words(tmp_path, "a", 200), "weight": 1},
        {"path": words(tmp_path, "b", 200), "weight": 3},
    ]
    data = prepared(method="pt", datasets=sources)
    counts = named(data.train)
    # All of "a" once, and "b" three times as often: four standard deviations of the drawing.
    assert counts["a"] == 200
    assert counts["b"] == pytest.approx(600, abs=4 * (200 * 3 * 4) ** 0.5)
    assert [each.share for each in data.sources] == [0.25, 0.75]
    expected = datasets.interleave_datasets(
        [
            datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(200)]})
            for name in "ab"
        ],
        probabilities=[0.25, 0.75],
        seed=0,
        stopping_strategy="all_exhausted",
    )
    assert data.train["text"] == expected["text"]


def test_the_same_weight_for_all_is_the_same_share(tmp_path: Path) -> None:
    sources = [
        {"path": words(tmp_path, "a", 10), "weight": 1},
        {"path": words(tmp_path, "b", 100), "weight": 1},
    ]
    counts = named(prepared(method="pt", datasets=sources).train)
    assert counts["a"] > 60
    assert counts["b"] == 100


def test_mixing_is_the_same_for_a_seed_alone(tmp_path: Path) -> None:
    sources = [{"path": words(tmp_path, name, 20), "weight": 1 + (name == "b")} for name in "ab"]
    one, again, other = (
        prepared(method="pt", datasets=sources, seed=seed).train["text"] for seed in (1, 1, 2)
    )
    assert list(one) == list(again)
    assert list(one) != list(other)


def test_streaming_sources_are_mixed_by_weight_too(tmp_path: Path) -> None:
    sources = [
        {"path": words(tmp_path, name, 50), "weight": 1 + 3 * (name == "b"), "streaming": True}
        for name in "ab"
    ]
    data = prepared(method="pt", datasets=sources, max_steps=1)
    one, again = ([row["text"] for row in data.train] for _ in range(2))
    assert one == again
    assert set(one) == {f"{name} {number}" for name in "ab" for number in range(50)}
    assert (data.rows, data.columns) == (None, ("text",))
    sources[0]["weight"] = sources[1]["weight"] = None
    with pytest.raises(DataError, match="give every one of them a weight"):
        prepared(method="pt", datasets=sources, max_steps=1)


def test_broken_rows_behind_the_first_of_a_stream_stop_it(tmp_path: Path) -> None:
    rows = [{"text": "t" if number != 1500 else None} for number in range(1600)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    data = prepared(method="pt", datasets=[{"path": str(path), "streaming": True}])
    with pytest.raises(DataError, match="line 1501: text is missing"):
        list(data.train)


def test_some_weights_are_none_at_all(tmp_path: Path) -> None:
    sources = [{"path": words(tmp_path, "a", 3), "weight": 1}, words(tmp_path, "b", 3)]
    with pytest.raises(DataError, match="Some sources of a mixture have a weight"):
        prepared(method="pt", datasets=sources)


def test_held_out_examples_are_no_others_in_any_order(tmp_path: Path) -> None:
    path = words(tmp_path, "a", 40)
    data = prepared(method="pt", datasets=path, eval_fraction=0.2)
    held = set(data.evaluation["text"])
    assert len(held) == 8
    assert held.isdisjoint(data.train["text"])
    assert len(held | set(data.train["text"])) == 40
    lines = Path(path).read_text().splitlines()
    Path(path).write_text("\n".join(reversed(lines)))
    assert set(prepared(method="pt", datasets=path, eval_fraction=0.2).evaluation["text"]) == held
    other = prepared(method="pt", datasets=path, eval_fraction=0.2, seed=1)
    assert set(other.evaluation["text"]) != held


def test_equal_examples_and_prompts_stay_on_one_side(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"w{number % 10}", "chosen": f"w{number}", "rejected": "bad"}
        for number in range(30)
    ]
    path = str(jsonl(tmp_path / "a.jsonl", rows))
    for method in ("dpo", "kto"):
        data = prepared(method=method, datasets=[path, path], eval_fraction=0.1)
        sides = [Counter(side["prompt"]) for side in (data.train, data.evaluation)]
        assert set(sides[0]).isdisjoint(sides[1])
        assert sum(sides[1].values()) == (6 if method == "dpo" else 12)
    with pytest.raises(DataError, match="can't be held out"):
        prepared(method="dpo", datasets=path, eval_fraction=0.01)


def test_sources_by_weight_repeat_no_example_that_is_held_out(tmp_path: Path) -> None:
    sources = [{"path": words(tmp_path, name, 20), "weight": 1 + (name == "b")} for name in "ab"]
    data = prepared(method="pt", datasets=sources, eval_fraction=0.1)
    assert len(data.evaluation) == 4
    assert set(data.evaluation["text"]).isdisjoint(data.train["text"])
    assert sum(each.held_out for each in data.sources) == 4


def test_eval_datasets_are_taken_whole(tmp_path: Path) -> None:
    a, b = words(tmp_path, "a", 3), words(tmp_path, "b", 2)
    data = prepared(method="pt", datasets=a, eval_datasets=[b, a])
    assert data.evaluation["text"] == ["b 0", "b 1", "a 0", "a 1", "a 2"]
    with pytest.raises(DataError, match="measured whole"):
        prepared(method="pt", datasets=a, eval_datasets=[{"path": b, "weight": 2}])


def test_the_digest_changes_with_any_source(tmp_path: Path) -> None:
    a, b = words(tmp_path, "a", 3), words(tmp_path, "b", 2)
    before = prepared(method="pt", datasets=a, eval_datasets=b).digest
    assert prepared(method="pt", datasets=a, eval_datasets=b).digest == before
    assert prepared(method="pt", datasets=a).digest != before
    words(tmp_path, "b", 3)
    assert prepared(method="pt", datasets=a, eval_datasets=b).digest != before


def test_conversations_of_both_kinds_mix_if_it_is_said_what_is_learnt(tmp_path: Path) -> None:
    rows = [{"instruction": "w1", "output": "w2"}]
    sources = [talks(tmp_path), str(jsonl(tmp_path / "alpaca.jsonl", rows))]
    with pytest.raises(DataError, match="can't be mixed") as error:
        prepared(method="sft", datasets=sources)
    assert "assistant_only_loss" in str(error.value.cure)
    data = prepared(method="sft", datasets=sources, assistant_only_loss=False)
    assert data.train[3] == {"messages": [said("user", "w1"), said("assistant", "w2")]}
    assert data.format == "messages + alpaca"


def test_texts_and_conversations_never_mix(tmp_path: Path) -> None:
    sources = [talks(tmp_path), words(tmp_path, "a", 2)]
    with pytest.raises(DataError, match="can't be mixed"):
        prepared(method="sft", datasets=sources, assistant_only_loss=False)


def test_tools_are_none_where_a_source_has_none(tmp_path: Path) -> None:
    talk = [said("user", "w1"), said("assistant", "w2")]
    path = jsonl(tmp_path / "tools.jsonl", [{"messages": talk, "tools": [{"name": "add"}]}])
    data = prepared(method="sft", datasets=[talks(tmp_path, 1), str(path)])
    assert data.train["tools"] == [None, '[{"name": "add"}]']


def test_everything_wrong_with_several_sources_is_told_at_once(tmp_path: Path) -> None:
    empty = jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError) as error:
        prepared(method="pt", datasets=[str(tmp_path / "no.jsonl"), str(empty)])
    assert error.value.what == "2 of 2 datasets can't be used."
    assert "no.jsonl" in str(error.value)
    assert "holds no example" in str(error.value)


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template") as error:
        prepared(tokenizer, method="sft", datasets=talks(tmp_path))
    assert str(error.value.cure).startswith("chat_template:")
    assert prepared(tokenizer, method="pt", datasets=words(tmp_path, "a", 2)).rows == 2


def test_texts_need_a_token_that_ends_them(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no token that ends them"):
        prepared(tokenizer, method="pt", datasets=words(tmp_path, "a", 2))


def test_what_is_learnt_must_mean_something_to_the_examples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="completion_only_loss: there is no prompt"):
        prepared(method="sft", datasets=talks(tmp_path), completion_only_loss=True)
    with pytest.raises(DataError, match="assistant_only_loss: these examples are no conv"):
        prepared(method="sft", datasets=words(tmp_path, "a", 2), assistant_only_loss=True)
    with pytest.raises(DataError, match="doesn't mark what the assistant says"):
        prepared(method="sft", datasets=talks(tmp_path), assistant_only_loss=True)
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = MARKED
    data = prepared(tokenizer, method="sft", datasets=talks(tmp_path), assistant_only_loss=True)
    assert data.columns == ("messages",)


def test_a_template_that_refuses_is_an_error_of_the_data(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('users only') }}"
    with pytest.raises(DataError, match="conversation of user, assistant: users only"):
        prepared(tokenizer, method="sft", datasets=talks(tmp_path))


def test_a_template_is_a_file_or_a_text(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(MARKED)
    assert read_template("chat.jinja", tmp_path) == MARKED
    assert read_template(MARKED, tmp_path) == MARKED
    with pytest.raises(DataError, match="neither a template nor a file"):
        read_template("chat.jinj", tmp_path)
