"""What a run keeps, what it runs again and why, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.errors import DirectoryInUseError, LaminaError
from lamina.training.plan import read_plan
from lamina.training.run import Told, run_plan
from lamina.training.run.callbacks import check_trainable
from lamina.training.run.lock import locked
from tests import models
from tests.stages.chains import llama_lora
from tests.training.run import plans

STAGES: list[dict[str, Any]] = [
    {"name": "a", "method": "pt"},
    {"name": "b", "method": "sft", "mode": "stack"},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end, to copy."""
    folder = tmp_path_factory.mktemp("finished")
    plans.run(plans.write_plan(folder, STAGES))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    plan = tmp_path / "run" / "plan.yaml"
    plan.write_text(plan.read_text().replace(str(finished), str(tmp_path / "run")))
    return tmp_path / "run"


def statuses(folder: Path, *changes: str) -> dict[str, tuple[str, str]]:
    told = Heard()
    result = plans.run(folder / "plan.yaml", *changes, console=told)
    return {each.name: (each.status, told.why.get(each.name, "")) for each in result.stages}


class Heard(Told):
    """Remembers why stages were run."""

    def __init__(self) -> None:
        self.why: dict[str, str] = {}

    def stage_begins(self, name: str, number: int, why: str) -> None:
        self.why[name] = why


def test_a_run_leaves_stages_logs_and_a_state(finished: Path) -> None:
    out = finished / "out"
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "a",
        "b",
        "evaluation.json",
        "logs",
        "run.json",
    ]
    record = lamina.lineage(out / "b")
    assert [(each.name, each.mode) for each in record.stages] == [("a", "fresh"), ("b", "stack")]
    last = [each for each in plans.log_of(finished, "b") if "loss" in each][-1]
    assert record.newest.metrics["train_loss"] == last["loss"]
    assert record.newest.data["rows"] == 16
    lamina.verify(out / "b", models.tiny_llama()).raise_if_failed()
    assert (out / "b" / "tokenizer.json").is_file()


def test_what_is_finished_is_kept(folder: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (folder / "out").rglob("*.safetensors")}
    assert statuses(folder) == {"a": ("kept", ""), "b": ("kept", "")}
    assert statuses(folder, "logging_steps=2", "save_steps=1")["b"][0] == "kept"
    assert before == {f: f.stat().st_mtime_ns for f in (folder / "out").rglob("*.safetensors")}


def test_another_setting_runs_a_stage_again_and_those_on_it(folder: Path) -> None:
    told = statuses(folder, "stages.a.learning_rate=0.01")
    assert told["a"] == ("trained", "learning_rate: 0.02 -> 0.01")
    assert told["b"] == ("trained", "the stage before changed")


def test_a_later_stage_alone_is_run_again(folder: Path) -> None:
    told = statuses(folder, "stages.b.lora_r=2")
    assert told["a"][0] == "kept"
    assert told["b"] == ("trained", "lora_r: 4 -> 2; lora_alpha: 8.0 -> 4.0")


def test_other_data_run_a_stage_again(folder: Path) -> None:
    file = folder / "sft.jsonl"
    file.write_text(file.read_text().replace("w7", "w8"))
    told = statuses(folder)
    assert told == {"a": ("kept", ""), "b": ("trained", "data changed")}


def test_the_same_data_elsewhere_change_nothing(folder: Path) -> None:
    (folder / "sft.jsonl").rename(folder / "other.jsonl")
    assert statuses(folder, "stages.b.datasets=other.jsonl")["b"][0] == "kept"


def test_a_run_again_comes_to_the_same(folder: Path) -> None:
    before = plans.tensors(folder / "out" / "b")
    result = plans.run(folder / "plan.yaml", resume=False)
    assert [each.status for each in result.stages] == ["trained", "trained"]
    for name, tensor in plans.tensors(folder / "out" / "b").items():
        assert torch.equal(tensor, before[name])


def test_a_stage_that_is_gone_is_run_again(folder: Path) -> None:
    before = plans.tensors(folder / "out" / "a")
    shutil.rmtree(folder / "out" / "a")
    told = statuses(folder)
    assert told["a"][0] == "trained"
    assert told["b"][0] == "kept"
    for name, tensor in plans.tensors(folder / "out" / "a").items():
        assert torch.equal(tensor, before[name])


def test_a_stage_that_somebody_changed_is_not_overwritten(folder: Path) -> None:
    file = folder / "out" / "a" / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 4', '"r": 5'))
    for changes in ((), ("stages.a.lora_r=2",)):
        with pytest.raises(lamina.RunError, match=r"a: adapter_config\.json was changed"):
            statuses(folder, *changes)
    assert '"r": 5' in file.read_text()


def test_an_adapter_of_others_is_not_overwritten(folder: Path) -> None:
    (folder / "out" / "run.json").unlink()
    with pytest.raises(lamina.RunError, match="this run didn't save"):
        statuses(folder)


def test_a_launcher_of_several_processes_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(lamina.PlanError, match="one process"):
        statuses(folder)


def test_two_runs_are_kept_out_of_one_directory(folder: Path) -> None:
    with (
        locked(folder / "out"),
        pytest.raises(DirectoryInUseError, match=rf"process {os.getpid()}"),
    ):
        statuses(folder)
    assert statuses(folder)["a"][0] == "kept"


def test_ctrl_c_saves_and_stops_and_the_same_command_goes_on(
    finished: Path, tmp_path: Path
) -> None:
    class Interrupting(Told):
        def step(self, name: str, step: int, steps: int) -> None:
            if (name, step) == ("b", 3):
                os.kill(os.getpid(), signal.SIGINT)

    path = plans.write_plan(tmp_path, STAGES, base=finished / "base")
    before = signal.getsignal(signal.SIGINT)
    result = plans.run(path, console=Interrupting())
    assert signal.getsignal(signal.SIGINT) is before
    assert result.interrupted
    assert [each.status for each in result.stages] == ["trained", "interrupted"]
    state = json.loads((tmp_path / "out" / "run.json").read_text())
    assert state["stages"]["b"]["status"] == "interrupted"
    assert not (tmp_path / "out" / "b").exists()
    again = plans.run(path)
    assert [(each.status, each.why) for each in again.stages] == [
        ("kept", ""),
        ("resumed", "went on from step 3"),
    ]
    for name, tensor in plans.tensors(tmp_path / "out" / "b").items():
        assert torch.equal(tensor, plans.tensors(finished / "out" / "b")[name])


def test_all_that_trl_would_refuse_is_told_before_anything_starts(folder: Path) -> None:
    shutil.rmtree(folder / "out")
    with pytest.raises(lamina.PlanError) as error:
        statuses(
            folder,
            "stages.a.trainer_args={warmup_step: 3}",
            "stages.b.trainer_args={output_dir: elsewhere, report_to: wandb}",
        )
    told = str(error.value)
    assert "SFTConfig has no such field; did you mean 'warmup_steps'?" in told
    assert "stages.b.trainer_args.output_dir" in told
    assert "use report_to" in told
    assert not (folder / "out").exists()


def test_arguments_of_trl_are_passed_on(finished: Path, tmp_path: Path) -> None:
    path = plans.write_plan(tmp_path, STAGES[:1], base=finished / "base")
    result = plans.run(path, "stages.a.trainer_args={max_steps: 1, save_steps: 1}")
    assert result.stages[0].steps == 1


def test_data_of_the_last_stage_are_looked_at_before_the_first(
    finished: Path, tmp_path: Path
) -> None:
    path = plans.write_plan(tmp_path, STAGES, base=finished / "base")
    with pytest.raises(LaminaError, match="nowhere"):
        plans.run(path, "stages.b.datasets=nowhere.jsonl")
    assert not (tmp_path / "out" / "a").exists()


class Steps(Told):
    """Remembers the lines of the log."""

    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []

    def logged(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        self.lines.append(values)


def test_a_stage_ends_when_it_no_longer_gets_better(finished: Path, tmp_path: Path) -> None:
    """A rate at which it gets worse at once: the first evaluation is the best one."""
    stage = {
        **STAGES[0],
        "max_steps": 40,
        "eval_fraction": 0.25,
        "eval_steps": 2,
        "save_steps": 2,
        "early_stopping_patience": 2,
        "learning_rate": 3.0,
    }
    path = plans.write_plan(tmp_path, [stage], base=finished / "base")
    told = Steps()
    result = plans.run(path, console=told)
    measured = {line["step"]: line["eval_loss"] for line in told.lines if "eval_loss" in line}
    best = min(measured, key=lambda step: measured[step])
    assert result.stages[0].steps == best + 4 < 40
    base = models.tiny_llama()
    model = lamina.load(result.path, base)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_b_learns_faster_with_loraplus(finished: Path, tmp_path: Path) -> None:
    """Adam's first step is the learning rate: at ratio 8 the B of one step is 8 times as large."""
    sizes = {}
    for ratio in (1, 8):
        stage = {
            **STAGES[0],
            "max_steps": 1,
            "warmup_steps": 0,
            "learning_rate": 0.001,
            "loraplus_lr_ratio": ratio,
        }
        path = plans.write_plan(
            tmp_path, [stage], base=finished / "base", output_dir=f"ratio-{ratio}"
        )
        tensors = plans.tensors(plans.run(path).path)
        sizes[ratio] = torch.cat([t.flatten() for n, t in tensors.items() if "lora_B" in n])
    torch.testing.assert_close(sizes[8], 8 * sizes[1], rtol=1e-3, atol=1e-7)


def test_a_run_that_is_moved_finds_its_best_step(finished: Path, tmp_path: Path) -> None:
    stage = {
        **STAGES[0],
        "max_steps": 30,
        "eval_fraction": 0.25,
        "eval_steps": 1,
        "save_steps": 1,
        "early_stopping_patience": 4,
        "learning_rate": 3.0,
    }

    class Stopping(Told):
        def step(self, name: str, step: int, steps: int) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    path = plans.write_plan(tmp_path, [stage], base=finished / "base")
    whole = plans.run(path, f"output_dir={tmp_path / 'whole'}")
    assert plans.run(path, console=Stopping()).interrupted
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = plans.run(path, f"output_dir={tmp_path / 'moved'}")
    assert moved.stages[0].status == "resumed"
    for name, tensor in plans.tensors(moved.path).items():
        assert torch.equal(tensor, plans.tensors(whole.path)[name])


CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} "
    "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def test_what_the_assistant_says_alone_is_learned(finished: Path, tmp_path: Path) -> None:
    """What the user says decides nothing but what comes before: its loss has no part."""
    from tests.ecosystem import texts

    rows = [
        {
            "messages": [
                {"role": "user", "content": texts.sentence(row)},
                {"role": "assistant", "content": texts.sentence(row + 6, 3)},
            ]
        }
        for row in range(8)
    ]
    plans.write_rows(tmp_path / "talk.jsonl", rows)
    stage = {
        "name": "talk",
        "method": "sft",
        "datasets": "talk.jsonl",
        "assistant_only_loss": True,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
    }
    path = plans.write_plan(tmp_path, [stage], base=finished / "base", chat_template=CHAT)
    plans.run(path)
    base, tokenizer = models.tiny_llama(), texts.tokenizer()
    expected = []
    for row in rows:
        said = [tokenizer(m["content"]).input_ids for m in row["messages"]]
        ids = torch.tensor([said[0] + said[1]])
        with torch.no_grad():
            likely = torch.log_softmax(base(input_ids=ids).logits, -1)
        start = len(said[0])
        picked = likely[0, start - 1 : -1].gather(1, ids[0, start:, None])
        expected.append(-picked.flatten())
    loss = plans.log_of(tmp_path, "talk")[0]["loss"]
    assert loss == pytest.approx(float(torch.cat(expected).mean()), abs=1e-4)


@pytest.mark.parametrize(
    "setting",
    ["gradient_checkpointing: true", "neftune_noise_alpha: 5", "dtype: bfloat16"],
)
def test_a_choice_takes_part(setting: str, finished: Path, tmp_path: Path) -> None:
    """Noise and dtype change the result; checkpointing computes the same."""
    name, value = setting.split(": ")
    path = plans.write_plan(tmp_path, STAGES[:1], base=finished / "base")
    plans.run(path, f"{name}={value}")
    mine = plans.tensors(tmp_path / "out" / "a")
    plain = plans.tensors(finished / "out" / "a")
    same = all(torch.allclose(mine[key], plain[key], atol=1e-6) for key in plain)
    assert same is (name == "gradient_checkpointing")
    assert {tensor.dtype for tensor in mine.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_base_of_codes_is_trained_on(bits: str, finished: Path, tmp_path: Path) -> None:
    path = plans.write_plan(tmp_path, STAGES, base=finished / "base")
    result = plans.run(path, f"{bits}=true")
    record = lamina.lineage(result.path)
    assert [each.name for each in record.stages] == ["a", "b"]
    losses = [line["loss"] for line in plans.log_of(tmp_path, "a") if "loss" in line]
    assert losses[-1] < losses[0]


def test_what_is_trainable_besides_is_refused() -> None:
    model = lamina.begin_stage(models.tiny_llama(), name="a", config=llama_lora())
    check_trainable(model, None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad][:-1])
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(lamina.PreflightError) as error:
        check_trainable(model, optimizer)
    assert "no part of 'a': base_model.model.lm_head.weight" in str(error.value)
    assert "the optimizer has no " in str(error.value)


def test_peft_is_itself_again_after_a_run(finished: Path) -> None:
    import peft

    run_plan(read_plan(finished / "plan.yaml"), root=finished)
    assert not issubclass(lamina.PeftModel, peft.PeftModel)


def test_texts_that_are_packed_know_nothing_of_one_another(finished: Path, tmp_path: Path) -> None:
    from tests.ecosystem import texts

    stage = {"name": "packed", "method": "pt", "packing": True, "max_length": 33, "max_steps": 1}
    path = plans.write_plan(tmp_path, [stage], base=finished / "base")
    plans.run(path, "per_device_train_batch_size=8")
    base, tokenizer = models.tiny_llama(), texts.tokenizer()
    expected = []
    for row in texts.texts():
        ids = torch.tensor([[*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            likely = torch.log_softmax(base(input_ids=ids).logits, -1)
        expected.append(-likely[0, :-1].gather(1, ids[0, 1:, None]).flatten())
    loss = plans.log_of(tmp_path, "packed")[0]["loss"]
    assert loss == pytest.approx(float(torch.cat(expected).mean()), abs=1e-4)
