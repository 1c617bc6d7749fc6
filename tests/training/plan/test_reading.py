"""Plans, and what is said of those that can't be run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lamina.errors import PlanError
from lamina.training.plan import Plan, json_schema, read_plan

GOOD = """
model_name_or_path: base
output_dir: runs/bot
defaults: {learning_rate: 1e-4, lora_r: 8}
evals:
  domain: {datasets: held_out.txt}
stages:
  - {name: domain, method: pt, datasets: manual.txt}
  - name: chat
    mode: stack
    method: sft
    datasets:
      - {path: talks.jsonl, weight: 1}
      - {path: more.jsonl, weight: 0.5}
    lora_alpha: 4
    gate: {may_lose: {domain: 5%}}
  - {name: dpo, mode: continue, method: dpo, datasets: pairs.jsonl, reference: chat}
"""


def write(path: Path, text: str) -> Path:
    file = path / "plan.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def faults_of(path: Path, text: str, *changes: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        read_plan(write(path, text), changes)
    return list(caught.value.faults)


def with_stage(**settings: Any) -> str:
    stage = {"name": "a", "method": "sft", "datasets": "a.jsonl", **settings}
    return yaml.safe_dump({"model_name_or_path": "b", "output_dir": "o", "stages": [stage]})


def test_a_plan_with_its_defaults(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, GOOD))
    domain, chat, dpo = map(plan.settings_of, plan.stages)
    assert [stage.mode for stage in plan.stages] == [None, "stack", "continue"]
    # A stage's own settings, then the defaults, then the method's, then Lamina's.
    assert (domain.learning_rate, dpo.learning_rate) == (1e-4, 1e-4)
    assert (domain.lora_r, domain.lora_alpha, chat.lora_alpha) == (8, 16, 4)
    assert (domain.max_length, dpo.method) == (1024, "dpo")
    assert [(d.path, d.weight) for d in chat.datasets or ()] == [
        ("talks.jsonl", 1),
        ("more.jsonl", 0.5),
    ]
    assert chat.gate is not None
    assert chat.gate.may_lose == {"domain": 0.05}


def test_the_learning_rate_is_that_of_the_method(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, with_stage(method="dpo")))
    assert plan.settings_of(plan.stages[0]).learning_rate == 5e-6


def test_the_command_line_says_otherwise(tmp_path: Path) -> None:
    changes = [
        "stages.chat.lora_r=4",
        "stages.0.seed=7",
        "--output-dir=runs/other",
        "lora_dropout=0.1",
    ]
    plan = read_plan(write(tmp_path, GOOD), changes)
    settings = [plan.settings_of(stage) for stage in plan.stages]
    assert [each.lora_r for each in settings] == [8, 4, 8]
    assert [each.seed for each in settings] == [7, 42, 42]
    assert {each.lora_dropout for each in settings} == {0.1}
    assert plan.output_dir == "runs/other"


def test_names_of_other_tools(tmp_path: Path) -> None:
    text = with_stage(lora_rank=5, cutoff_len=99, micro_batch_size=3, sample_packing=True)
    stage = read_plan(write(tmp_path, text.replace("model_name_or_path", "base_model"))).stages[0]
    assert (stage.lora_r, stage.max_length, stage.packing) == (5, 99, True)
    assert stage.per_device_train_batch_size == 3
    (told,) = faults_of(tmp_path, with_stage(lora_rank=5, lora_r=6))
    assert told.endswith("a.lora_rank: means lora_r, which is given too")


TWELVE = """\
model_name_or_path: base
output_dir: runs/x
learning_rate: 1e-4
defaults:
  lerning_rate: 1e-4
  lora_dropout: 1.5
evals:
  domain: {datasets: d.jsonl}
  both: {}
stages:
  - name: domain
    mode: stack
    method: pt
    datasets: a.txt
  - name: domain
    method: spft
    mode: stak
    datasets: [{path: b.jsonl, formt: text}]
    gate: {may_lose: {domian: 5%}}
  - name: pref
    method: dpo
    mode: continue
    reference: chat
    datasets: c.jsonl
    lora_r: 5
"""


def test_twelve_faults_in_one_message_with_their_lines_and_at_once(tmp_path: Path) -> None:
    began = time.perf_counter()
    faults = faults_of(tmp_path, TWELVE)
    assert time.perf_counter() - began < 2
    assert [each.partition(":")[0] for each in faults] == [
        f"line {n}" for n in (3, 5, 6, 9, 12, 15, 16, 17, 18, 19, 23, 25)
    ]
    text = "\n".join(faults)
    for told in (
        "lora_r: continue trains the parent's ranks on",
        "did you mean 'learning_rate'?",
        "did you mean 'sft'?",
        "did you mean 'stack'?",
        "did you mean 'format'?",
        "did you mean 'domain'?",
        "put it under defaults",
        "has neither",
        "the first stage has no parent",
        "name of an earlier stage",
        "neither parent, base nor an earlier stage",
        "less than 1, not 1.5",
    ):
        assert told in text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": None}, "say what it does"),
        ({"datasets": None}, "no datasets"),
        ({"method": "grpo"}, "needs reward_functions"),
        ({"method": "grpo", "reward_functions": "nonsense"}, "reward_functions"),
        ({"beta": 0.1}, "means nothing to sft"),
        ({"eval_steps": 5}, "needs eval_datasets or eval_fraction in stage 'a'"),
        ({"max_steps": 5, "num_train_epochs": 1}, "one of them is enough"),
        ({"datasets": [{"path": "a", "streaming": True}]}, "give max_steps"),
        ({"name": "../outside"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"gate": {"may_lose": {"x": "five%"}}}, "gate"),
    ],
)
def test_what_contradicts_or_is_missing(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    assert any(told in fault for fault in faults_of(tmp_path, with_stage(**settings)))


def test_merge_on_a_quantised_base_is_refused_and_not_changed(tmp_path: Path) -> None:
    text = GOOD.replace("mode: stack", "mode: merge") + "load_in_4bit: true\n"
    (told,) = faults_of(tmp_path, text)
    assert "stack computes the same" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "this file is empty"),
        ("- a\n- b\n", "this file is a list"),
        ("a: [1,\n  b", "line 2"),
        ("\tx: 1", "line 1"),
        ("a: 1\na: 2\n", "'a' is given twice, first in line 1"),
        ("? [x]\n: 1\n", "line 1"),
        ("a: !!python/object/apply:os.system ['echo']\n", "line 1"),
    ],
)
def test_a_file_that_is_no_plan(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        read_plan(write(tmp_path, text))
    assert told in str(caught.value)


def test_a_file_that_blows_up_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    began = time.perf_counter()
    with pytest.raises(PlanError, match="larger than any plan"):
        read_plan(write(tmp_path, "\n".join(lines)))
    assert time.perf_counter() - began < 5


def test_a_file_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="can't be read"):
        read_plan(tmp_path / "none.yaml")
    (tmp_path / "plan.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not UTF-8"):
        read_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize("change", ["nonsense", "=3", "stages.none.lora_r=3", "output_dir.x=1"])
def test_what_the_command_line_says_and_nobody_understands(change: str, tmp_path: Path) -> None:
    (told,) = faults_of(tmp_path, GOOD, change)
    assert told.startswith(f"command line: {change}")


def test_reading_a_plan_imports_no_torch(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    code = (
        "import sys; from lamina.training.plan import read_plan; "
        "read_plan('plan.yaml'); assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_the_schema_of_editors_knows_every_field() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Plan.model_fields)
    assert json.dumps(schema)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"lora_target_modules": 5},
            "lora_target_modules: must be a text or a list of texts, not 5",
        ),
        ({"lora_exclude_modules": [1]}, "must be a text or a list of texts, not [1]"),
        ({"init_lora_weights": 3.5}, "must be true, false or a text, not 3.5"),
        (
            {"trainable_token_indices": "x"},
            "must be a list of whole numbers or a mapping of names to lists of whole numbers",
        ),
        ({"lora_r": "x"}, "lora_r: must be a whole number, not 'x'"),
        ({"max_steps": 1.5}, "must be a whole number, not 1.5"),
        ({"lora_alpha": True}, "lora_alpha: must be a number, not True"),
        ({"learning_rate": "fast"}, "must be a number, not 'fast'"),
        ({"use_dora": "maybe"}, "must be true or false, not 'maybe'"),
        ({"rank_pattern": {"a": 0}}, "rank_pattern.a: must be more than 0, not 0"),
        ({"seed": -1}, "must be at least 0, not -1"),
        ({"optim": 3}, "must be a text, not 3"),
        ({"trainer_args": [1]}, "must be a mapping of names to values, not [1]"),
        ({"gate": 5}, "gate: must be a mapping of names to values, not 5"),
        ({"name": "x" * 65}, "must have at most 64 characters, not 65"),
        ({"name": "a b"}, "must be letters, digits, - and _ only"),
        ({"datasets": [{"path": ""}]}, "datasets.1.path: is empty"),
        ({"datasets": [{}]}, "datasets.1.path: is missing"),
        ({"datasets": []}, "datasets: is empty: give 1 or more"),
        ({"datasets": {"pth": "a"}}, "datasets.pth: is unknown; did you mean 'path'?"),
        ({"dtype": "auto"}, "put it at the top"),
        ({"lora_target_modules": "((("}, "is not a regular expression"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias=True goes with"),
        ({"lora_target_linear": 5}, "lora_target_linear: must be true or false, not 5"),
    ],
)
def test_one_sentence_for_each_kind_of_wrong_value(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    faults = faults_of(tmp_path, with_stage(**settings))
    assert sum(told in fault for fault in faults) == 1, faults
    setting = next(iter(settings))
    assert sum(setting in fault for fault in faults) == 1 or setting == "datasets", faults


def test_what_a_stage_says_is_not_overruled_by_the_defaults(tmp_path: Path) -> None:
    text = with_stage(num_train_epochs=3) + "defaults: {max_steps: 5, eval_fraction: 0.1}\n"
    plan = read_plan(write(tmp_path, text))
    settings = plan.settings_of(plan.stages[0])
    assert (settings.max_steps, settings.num_train_epochs) == (None, 3)
    assert settings.eval_fraction == 0.1


def test_defaults_that_mean_nothing_to_a_stage_of_them(tmp_path: Path) -> None:
    defaults = "{early_stopping_patience: 2, max_steps: 1, num_train_epochs: 1}"
    faults = "".join(faults_of(tmp_path, with_stage() + f"defaults: {defaults}"))
    assert "early_stopping_patience: needs eval_datasets or eval_fraction in stage 'a'" in faults
    assert "num_train_epochs: max_steps is given too" in faults


def test_nothing_is_trained_on_a_reward_model(tmp_path: Path) -> None:
    text = with_stage(method="reward") + (
        "- {name: b, method: dpo, mode: stack, datasets: b.jsonl}\n"
    )
    (told,) = faults_of(tmp_path, text)
    assert "whose head writes no text" in told
