"""Local tasks of the lm-eval harness, run for real; its figures against its own and by hand."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.errors import PlanError
from lamina.training.evaluate.harness import Harness
from lamina.training.evaluate.harness_results import figures_of
from lamina.training.evaluate.harness_tasks import find_tasks, keeping_quiet
from lamina.training.evaluate.measuring import measure
from lamina.training.evaluate.prepared import Prepared, prepare_evals
from tests import models
from tests.ecosystem import texts
from tests.training.data.written import jsonl
from tests.training.evaluate.asked import plan, score
from tests.training.evaluate.test_exact import by_hand

pytest.importorskip("lm_eval")

CHOICES = ["w1 w7", "w2 w3 w4 w5", "w40"]
ROWS = [
    {"asked": texts.sentence(row, 3), "choices": CHOICES, "gold": row % 3, "level": row}
    for row in range(10)
]
CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: tasks/rows.jsonl, train: tasks/rows.jsonl}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{asked}}}}"
doc_to_target: gold
doc_to_choice: choices
{more}
"""
WRITTEN = """\
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/written.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{asked}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["never"], max_gen_toks: 5, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/rows.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{asked}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GROUP = """\
group: both
task: [words, again]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plan's folder with a task in it."""
    write(tmp_path / "plan", words=CHOICE.format(name="words", more=""))
    return tmp_path / "plan"


def write(folder: Path, **tasks: str) -> None:
    jsonl(folder / "tasks" / "rows.jsonl", ROWS)
    for name, text in tasks.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text)


def asked(folder: Path, *tasks: str, **settings: Any) -> Prepared:
    told = plan({"held": {"lm_eval": [*tasks], **settings}})
    return prepare_evals(told, tokenizer=texts.tokenizer(), root=folder)["held"]


def log_likelihood(model: Any, text: str, answer: str) -> float:
    """Of an answer behind a text, by hand."""
    tokenizer = texts.tokenizer()
    before = tokenizer(text)["input_ids"]
    ids = torch.tensor([before + tokenizer(answer)["input_ids"]])
    with torch.no_grad():
        said = model(input_ids=ids).logits[0].log_softmax(-1)
    return float(sum(said[i - 1, ids[0, i]] for i in range(len(before), ids.shape[1])))


def test_a_task_is_measured_as_by_hand(folder: Path) -> None:
    model = models.tiny_llama(seed=4)
    found = score(asked(folder, "tasks"), model, batch_size=4)
    hits = []
    for row in ROWS:
        # acc_norm: per character of the answer.
        per = [log_likelihood(model, row["asked"], each) / len(each) for each in CHOICES]
        hits.append(float(per.index(max(per)) == row["gold"]))
    share = sum(hits) / 10
    assert found.value == pytest.approx(share)
    assert found.error == pytest.approx(float(torch.tensor(hits).std()) / math.sqrt(10))
    assert found.details == {"words": pytest.approx(share)}
    assert (found.metric, found.examples, found.higher_is_better) == ("lm_eval", 10, True)


def test_figures_are_those_of_the_harness(folder: Path) -> None:
    write(folder, again=CHOICE.format(name="again", more="num_fewshot: 1"))
    held = asked(folder, "tasks/words.yaml", "tasks/again.yaml", num_fewshot=2, max_samples=7)
    model = models.tiny_llama(seed=4)
    found = score(held, model, batch_size=3)
    with keeping_quiet():
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        here = Path.cwd()
        os.chdir(folder)
        try:
            own = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=texts.tokenizer(), batch_size=3),
                tasks=["words", "again"],
                task_manager=manager,
                num_fewshot=2,
                limit=7,
                bootstrap_iters=1,
            )
        finally:
            os.chdir(here)
    results = own["results"]
    figures = [results[name]["acc_norm,none"] for name in ("words", "again")]
    errors = [results[name]["acc_norm_stderr,none"] for name in ("words", "again")]
    assert found.details == {"words": figures[0], "again": figures[1]}
    assert found.value == pytest.approx(sum(figures) / 2)
    assert found.error == pytest.approx(math.hypot(*errors) / 2)
    assert found.examples == 14


def test_answers_are_written(folder: Path) -> None:
    model = models.tiny_llama()
    said = [by_hand(model, row["asked"]) for row in ROWS[:4]]
    wanted = [said[0], said[1], "w1", "w2"]
    rows = [{"asked": r["asked"], "said": w} for r, w in zip(ROWS[:4], wanted, strict=True)]
    jsonl(folder / "tasks" / "written.jsonl", rows)
    write(folder, written=WRITTEN)
    found = score(asked(folder, "tasks/written.yaml"), model, batch_size=2)
    assert (found.value, found.examples) == (0.5, 4)


def test_of_perplexities_lower_is_better(folder: Path) -> None:
    write(folder, rolling=ROLLING)
    model = models.tiny_llama()
    found = score(asked(folder, "tasks/rolling.yaml"), model)
    assert not found.higher_is_better
    # Each text behind the token that texts begin with.
    nats = -sum(log_likelihood(model, "<s>", row["asked"]) for row in ROWS)
    words = sum(len(row["asked"].split()) for row in ROWS)
    assert found.value == pytest.approx(math.exp(nats / words), rel=1e-5)
    mixed = asked(folder, "tasks/rolling.yaml", "tasks/words.yaml")
    with pytest.raises(PlanError, match="of word_perplexity, lower is better"):
        score(mixed, model)


def test_a_group_has_the_figure_that_it_says(folder: Path) -> None:
    more = "process_docs: !function rows.some"
    write(folder, again=CHOICE.format(name="again", more=more), both=GROUP)
    (folder / "tasks" / "rows.py").write_text("def some(docs):\n    return docs.select(range(5))\n")
    held = asked(folder, "tasks")
    assert isinstance(held.material, Harness)
    assert held.material.tasks.names == ("both",)
    found = score(held, models.tiny_llama(seed=4))
    assert found.examples == 15
    assert found.details.keys() == {"both", "words", "again"}
    # The group weighs `acc`; single tasks have `acc_norm`, their first choice.
    assert found.value == found.details["both"]


def test_the_model_of_a_stage_is_left_as_it_is(folder: Path, capsys: Any) -> None:
    base = models.tiny_llama(tie_word_embeddings=True)
    config = lamina.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    model = lamina.get_peft_model(base, config).train()
    tokenizer = texts.tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    held = asked(folder, "tasks")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = {name: id(module) for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure(held, model, tokenizer, batch_size=2) is not None
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name: id(module) for name, module in model.named_modules()} == parts
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")


def test_scores_depend_on_what_tasks_say_and_not_on_where(folder: Path, tmp_path: Path) -> None:
    first = asked(folder, "tasks").hash
    shutil.copytree(folder, tmp_path / "moved")
    assert asked(tmp_path / "moved", "tasks").hash == first
    jsonl(folder / "tasks" / "rows.jsonl", [*ROWS[1:], ROWS[0]])
    second = asked(folder, "tasks").hash
    assert second != first
    assert asked(folder, "tasks", num_fewshot=1).hash != second
    write(folder, words=CHOICE.format(name="words", more="description: 'w1 '"))
    assert asked(folder, "tasks").hash not in {first, second}


def test_a_task_that_is_never_shown_examples_says_so(folder: Path) -> None:
    write(folder, never=CHOICE.format(name="never", more="num_fewshot: 0"))
    with pytest.raises(PlanError, match="never is always shown none"):
        asked(folder, "tasks", num_fewshot=2)
    assert asked(folder, "tasks", num_fewshot=0)


def test_what_a_task_lacks_is_told_before_anything_is_trained(folder: Path) -> None:
    (folder / "tasks" / "rows.jsonl").unlink()
    with pytest.raises(PlanError, match=r"harness ends in FileNotFoundError.*rows\.jsonl"):
        asked(folder, "tasks")
    (folder / "empty").mkdir()
    with pytest.raises(PlanError) as told:
        asked(folder, "empty", "tasks/other.yaml")
    assert "empty: no task is defined there" in str(told.value)
    assert "tasks/other.yaml: there is no such file" in str(told.value)


def test_a_reward_model_answers_no_tasks(folder: Path) -> None:
    held = asked(folder, "tasks")
    assert measure(held, models.tiny_llama(), texts.tokenizer(), head="reward") is None


def test_a_task_that_filters_answers_in_several_ways_has_the_first() -> None:
    results = {
        "results": {
            "sums": {
                "alias": "sums",
                "exact_match,strict": 0.25,
                "exact_match_stderr,strict": "N/A",
                "exact_match,flexible": 0.5,
                "sample_len": 4,
            }
        },
        "higher_is_better": {"sums": {"exact_match": True}},
        "n-samples": {"sums": {"original": 9, "effective": 4}},
    }
    found = figures_of(results, ["sums"])
    assert (found.value, found.error, found.examples) == (0.25, None, 4)


@pytest.mark.slow
def test_unknown_names_are_told_with_the_nearest(folder: Path) -> None:
    with pytest.raises(PlanError) as told:
        find_tasks(["helaswag", "words", "tasks", "gms8k"], folder)
    assert "there is no task 'helaswag'; did you mean 'hellaswag'" in str(told.value)
    assert "'gms8k'; did you mean 'gsm8k'" in str(told.value)
    assert len(told.value.faults) == 2
    # A tag stands for the tasks that have it.
    assert {"arc_easy", "arc_challenge"} <= {*find_tasks(["ai2_arc"], folder).names}


def test_details_are_json(folder: Path) -> None:
    found = score(asked(folder, "tasks"), models.tiny_llama())
    assert json.loads(json.dumps(dict(found.details))) == found.details
