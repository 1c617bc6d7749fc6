"""Dry runs of plans: all that keeps one from being run, by lines, and what it would train."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lamina.errors import PlanError
from lamina.training.plan import Plan, open_plan
from lamina.training.preflight import PlanReport, check_plan
from tests import models
from tests.ecosystem import texts

PLAN = """\
model_name_or_path: base
output_dir: runs
dtype: float32
defaults: {lora_r: 2, max_length: 32}
stages:
  - {name: domain, method: pt, datasets: plain.txt, lora_target_modules: [q_proj, up_proj]}
  - {name: chat, method: sft, mode: stack, datasets: [talks.jsonl], lora_r: 3}
  - {name: more, method: sft, mode: continue, datasets: talks.jsonl, max_steps: 7}
  - name: pairs
    method: dpo
    mode: merge
    datasets: {path: pairs.jsonl}
    modules_to_save: [lm_head]
"""
BROKEN = """\
model_name_or_path: base
output_dir: runs
report_to: tensorbord
defaults: {lora_r: 2, optim: adamw_trch}
evals:
  own: {datasets: pairs.jsonl, metric: "judge:scre"}
  lost: {datasets: lost.jsonl}
stages:
  - name: domain
    method: pt
    datasets: plain.txt
    lora_target_modules:
      - v_proj
      - q_prj
    use_dora: true
    trainer_args:
      lerning_rate: 3
      output_dir: x
  - name: chat
    method: sft
    mode: stack
    datasets:
      - talk.jsonl
      - path: pairs.jsonl
    loss_type: nlll
    rank_pattern: {q_prj: 3}
  - name: pairs
    method: dpo
    mode: stack
    datasets: talks.jsonl
    lr_scheduler_type: cosin
    modules_to_save: [lm_hed]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer, and data."""
    made = tmp_path_factory.mktemp("plans")
    models.tiny_llama().save_pretrained(made / "base")
    texts.tokenizer().save_pretrained(made / "base")
    (made / "plain.txt").write_text("\n\n".join(texts.sentence(row) for row in range(5)))
    talk = {
        "messages": [
            {"role": "user", "content": texts.sentence(1)},
            {"role": "assistant", "content": texts.sentence(2)},
        ]
    }
    pair = {"prompt": texts.sentence(1), "chosen": " w1 w2", "rejected": " w3"}
    (made / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 9)
    (made / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 3)
    (made / "judge.py").write_text("def score(example):\n    return 1.0\n")
    return made


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    return


def checked(text: str, *changes: str) -> PlanReport:
    Path("plan.yaml").write_text(text)
    opened = open_plan("plan.yaml", changes)
    return check_plan(opened.plan, document=opened.document)


def test_what_every_stage_of_a_good_plan_would_train() -> None:
    report = checked(PLAN)
    assert report.faults == ()
    report.check()
    domain, chat, more, pairs = report.stages
    llama = models.tiny_llama().config
    h, ff, layers = llama.hidden_size, llama.intermediate_size, llama.num_hidden_layers
    # A is r x in, B is out x r.
    assert domain.trainable == 2 * layers * ((h + h) + (h + ff))
    assert domain.counts == {"q_proj": layers, "up_proj": layers}
    assert (domain.rank, domain.mode, domain.layers) == (2, "fresh", 2 * layers)
    assert (chat.rank, chat.layers, chat.examples) == (3, 7 * layers, 9)
    # 9 in batches of 4.
    assert (chat.steps, more.steps) == (3, 7)
    assert (more.rank, more.trainable) == (chat.rank, chat.trainable)
    every = sum(p.numel() for p in models.tiny_llama().lm_head.parameters())
    assert chat.trainable is not None
    assert pairs.trainable == chat.trainable * 2 // 3 + every
    assert (pairs.examples, pairs.formats) == (3, ("preference",))


def test_all_faults_of_a_bad_plan_with_their_lines() -> None:
    report = checked(BROKEN)
    assert not report.ready
    told = [
        (3, "'tensorbord' is none of"),
        (4, "did you mean 'adamw_torch'?"),
        (6, "did you mean 'score'?"),
        (7, "There is no lost.jsonl"),
        (14, "'q_prj' matched 0 modules; nearest: 'q_proj'"),
        (15, "is no sum of ranks"),
        (17, "did you mean 'learning_rate'?"),
        (18, "the run decides that"),
        (23, "'talks.jsonl'"),
        (24, "sft can't learn from"),
        (25, "did you mean 'nll'?"),
        (26, "nearest: 'q_proj'"),
        (30, "dpo can't learn from"),
        (31, "did you mean 'cosine'?"),
        (32, "nearest: 'lm_head'"),
    ]
    assert len(report.faults) == len(told), report.faults
    for (line, words), fault in zip(told, report.faults, strict=True):
        assert fault.startswith(f"line {line}: "), fault
        assert words in fault
    with pytest.raises(PlanError, match="15 faults"):
        report.check()


def test_a_base_that_is_not_there_is_one_fault_with_what_is(tmp_path: Path) -> None:
    for name in ("bass", str(Path("bass").resolve())):
        (fault,) = checked(PLAN, f"model_name_or_path={name}").faults
        assert fault.startswith("command line: model_name_or_path: ")
        assert (
            "did you mean 'base'?" in fault or f"did you mean '{Path('base').resolve()}'" in fault
        )


def test_weights_and_tokenizers_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "base" / "config.json").read_text())
    faults = checked(PLAN, f"model_name_or_path={tmp_path}").faults
    assert sum("has no weights" in fault for fault in faults) == 1
    assert sum("The tokenizer" in fault for fault in faults) == 1
    assert len(faults) == 2


def test_a_row_that_is_broken_far_down_the_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text((folder / "talks.jsonl").read_text() + '{"messages": 5}\n')
    (fault,) = checked(PLAN, f"stages.chat.datasets={file}").faults
    assert fault.startswith("command line: stages.chat.datasets: ")


def test_conversations_need_a_template(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    faults = checked(PLAN, f"tokenizer_name_or_path={tmp_path}").faults
    assert len(faults) == 2
    assert all("the tokenizer has no chat template" in fault for fault in faults)


def test_what_the_trainer_refuses_is_told_before_anything_begins() -> None:
    (fault,) = checked(PLAN, "stages.pairs.trainer_args={loss_weights: [1, 2]}").faults
    assert "stages.pairs" in fault
    assert "loss_weights" in fault


def test_a_plan_made_in_python_has_no_lines() -> None:
    values = yaml.safe_load(PLAN)
    values["stages"][0]["lora_target_modules"] = ["nix"]
    (fault,) = check_plan(Plan.model_validate(values), root=".").faults
    assert fault.startswith("stages.domain.lora_target_modules")


def test_a_shard_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "base").iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (fault,) = checked(PLAN, f"model_name_or_path={tmp_path}").faults
    assert "1 of its 1 files of weights aren't there: model-00001-of-00001.safetensors" in fault


def test_evals_are_looked_at_as_they_are_measured() -> None:
    evals = """evals:
  pairs: {datasets: pairs.jsonl, metric: accuracy}
  talks: {datasets: talks.jsonl, metric: accuracy}
  words: {datasets: plain.txt, metric: exact_match}
"""
    report = checked(PLAN.replace("stages:\n", f"{evals}stages:\n"))
    assert [each.partition(": ")[0] for each in report.faults] == ["line 7", "line 8"]
    assert report.faults[0].startswith("line 7: evals.talks: ")
    assert report.faults[1].startswith("line 8: evals.words: ")
