"""All that is wrong with all evals is told at once, and a hash says what scores depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lamina.errors import PlanError
from lamina.training.evaluate import prepared as module
from lamina.training.evaluate.prepared import prepare_evals
from lamina.training.plan import read_plan
from tests.ecosystem import texts
from tests.training.data.written import jsonl, said
from tests.training.evaluate.asked import plan, prepared

TEXTS = [{"text": texts.sentence(row, 4)} for row in range(5)]
ANSWERS = [{"prompt": texts.sentence(row), "completion": f" w{row}"} for row in range(5)]
TALKS = [{"messages": [said("user", "w1"), said("assistant", f"w{row}")]} for row in range(5)]


def test_a_plan_without_evals_has_none(tmp_path: Path) -> None:
    assert prepare_evals(plan({}), tokenizer=texts.tokenizer(), root=tmp_path) == {}


def test_evals_keep_the_order_of_the_plan(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS)
    asked = plan({name: {"datasets": "a.jsonl"} for name in ("z", "a", "m")})
    assert list(prepare_evals(asked, tokenizer=texts.tokenizer(), root=tmp_path)) == ["z", "a", "m"]


def test_all_faults_of_all_evals_are_told_at_once(tmp_path: Path) -> None:
    jsonl(tmp_path / "texts.jsonl", TEXTS)
    jsonl(tmp_path / "broken.jsonl", [{"text": "w1"}, {"text": 3}, {"text": ""}])
    jsonl(tmp_path / "none.jsonl", [])
    asked = plan(
        {
            "good": {"datasets": "texts.jsonl"},
            "gone": {"datasets": ["nowhere.jsonl", "none.jsonl"]},
            "broken": {"datasets": "broken.jsonl"},
            "pairs": {"datasets": "texts.jsonl", "metric": "accuracy"},
            "answers": {"datasets": "texts.jsonl", "metric": "exact_match"},
            "own": {"datasets": "texts.jsonl", "metric": "no_such_module:one"},
            "weighed": {"datasets": {"path": "texts.jsonl", "weight": 2, "streaming": True}},
            "shots": {"datasets": "texts.jsonl", "num_fewshot": 3, "max_new_tokens": 9},
        }
    )
    with pytest.raises(PlanError) as told:
        prepare_evals(asked, tokenizer=texts.tokenizer(), root=tmp_path)
    text = str(told.value)
    for name, part in {
        "gone": "nowhere.jsonl",
        "broken": "2 broken examples",
        "pairs": "laid out as text",
        "answers": "holds texts; there is no prompt",
        "own": "no_such_module can't be imported",
        "weighed": "weight: every example of an eval is measured once",
        "shots": "num_fewshot: means nothing to loss; it is for lm_eval",
    }.items():
        assert any(each.startswith(f"{name}: ") and part in each for each in told.value.faults), (
            text
        )
    assert "gone: none.jsonl holds no example" in text
    assert "weighed: datasets.0.streaming" in text
    assert "shots: max_new_tokens: means nothing to loss" in text
    assert "good" not in text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("lm_eval: a, metric: loss", "metric: means nothing to lm_eval"),
        ("lm_eval: a, max_new_tokens: 3", "max_new_tokens: means nothing to lm_eval"),
        ("datasets: a.jsonl, lm_eval: a", "either datasets or lm_eval; this has both"),
        ("max_samples: 3", "either datasets or lm_eval; this has neither"),
        ("datasets: a.jsonl, num_fewshot: 0", "num_fewshot: means nothing to loss"),
        ("datasets: a.jsonl, higher_is_better: true", "higher_is_better: means nothing to loss"),
        (
            "datasets: [a.jsonl, {path: b.jsonl, weight: 1}]",
            "datasets.2.weight: every example of an eval is measured once",
        ),
        ("datasets: {path: a.jsonl, streaming: true}", "datasets.streaming: an eval is read whole"),
    ],
)
def test_a_plan_is_refused_with_the_line(tmp_path: Path, settings: str, told: str) -> None:
    (tmp_path / "plan.yaml").write_text(
        "model_name_or_path: base\noutput_dir: out\nstages:\n"
        "- {name: one, method: pt, datasets: a.jsonl}\nevals:\n"
        f"  held: {{{settings}}}\n"
    )
    with pytest.raises(PlanError) as error:
        read_plan(tmp_path / "plan.yaml")
    (fault,) = error.value.faults
    assert fault.startswith("line 6: evals.held")
    assert told in fault


def test_functions_take_what_only_they_take(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        "model_name_or_path: base\noutput_dir: out\nstages:\n"
        "- {name: one, method: pt, datasets: a.jsonl}\nevals:\n"
        "  held: {datasets: a, metric: 'm:f', higher_is_better: false, max_new_tokens: 3}\n"
        "  tasks: {lm_eval: [a], num_fewshot: 0, max_length: 99, max_samples: 3}\n"
    )
    assert read_plan(tmp_path / "plan.yaml").evals["held"].higher_is_better is False


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": [*ANSWERS[1:], ANSWERS[0]]},
        {"max_length": 7},
        {"max_samples": 4},
        {"metric": "exact_match"},
    ],
)
def test_other_data_and_settings_have_another_hash(tmp_path: Path, changed: Any) -> None:
    first = prepared(tmp_path, ANSWERS).hash
    settings = {key: value for key, value in changed.items() if key != "rows"}
    assert prepared(tmp_path, changed.get("rows", ANSWERS), **settings).hash != first


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_what_scores_do_not_depend_on_has_no_part_in_the_hash(tmp_path: Path, metric: str) -> None:
    first = prepared(tmp_path / "one", ANSWERS, metric=metric, max_samples=5).hash
    # More data behind what is taken, another folder, names of columns.
    rows = [{"ask": r["prompt"], "completion": r["completion"]} for r in [*ANSWERS, ANSWERS[0]]]
    data = {"path": "held.jsonl", "columns": {"prompt": "ask"}, "max_samples": 5}
    assert prepared(tmp_path / "two", rows, metric=metric, datasets=data).hash == first


def test_tokenizer_template_and_versions_have_their_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "a.jsonl", TALKS)
    asked = plan({"held": {"datasets": "a.jsonl"}})

    def hash_of(tokenizer: Any) -> str:
        return prepare_evals(asked, tokenizer=tokenizer, root=tmp_path)["held"].hash

    other = texts.tokenizer()
    other.chat_template += "w9"
    grown = texts.tokenizer()
    grown.add_tokens(["more"])
    hashes = [hash_of(texts.tokenizer()), hash_of(other), hash_of(grown)]
    assert hash_of(texts.tokenizer()) == hashes[0]
    monkeypatch.setattr(module, "version", lambda package: f"next {package}")
    hashes.append(hash_of(texts.tokenizer()))
    assert len({*hashes}) == 4
