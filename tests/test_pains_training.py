"""What goes wrong elsewhere while stages are trained, and what a run of a plan does instead.

Elsewhere is the real peft under TRL's own trainer, in this process. What is shown already:

- row 3: test_pains.test_row_3_training_that_learns_nothing_is_refused (a model by itself)
- row 4: test_pains_stages.test_elsewhere_the_parent_is_forgotten_at_inference,
  test_pains_stages.test_the_chain_is_in_the_file
- row 16: test_pains_family.test_row_16_what_is_resumed_has_the_runs_own_config,
  stages/test_checkpoints.test_another_alpha_is_refused
- row 17: test_pains_family.test_row_17_recomputed_activations_get_their_gradient,
  model/test_training.test_checkpointing_changes_no_gradient
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from torch import nn

import lamina
from lamina.errors import PreflightError
from lamina.model import PeftModel
from lamina.training.run import Told, stage
from lamina.training.run.status import status_of
from tests import models
from tests.ecosystem import texts
from tests.stages.chains import answer, distance, open_with_peft
from tests.training.run import plans

# TRL's settings set what newer releases of transformers call by another name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing:FutureWarning", "ignore::UserWarning:peft"
)
HERE = Path(__file__).parent
FIRST: dict[str, Any] = {"name": "first", "method": "pt"}
SECOND: dict[str, Any] = {"name": "second", "method": "sft", "mode": "stack"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    plans.write_base(folder)
    return folder


class Steps(Told):
    """Counts the steps of every stage, and what was told of its beginning."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.why: dict[str, str] = {}
        self.began: dict[str, int] = {}

    def stage_begins(self, name: str, number: int, why: str) -> None:
        self.why[name] = why

    def training_begins(self, name: str, step: int, steps: int) -> None:
        self.began[name] = step

    def step(self, name: str, step: int, steps: int) -> None:
        self.steps[name] = step


# Elsewhere


def their_config(**changes: Any) -> peft.LoraConfig:
    modules = ["q_proj", "v_proj"]
    return peft.LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM", **changes)


def their_trainer(model: nn.Module, folder: Path, **changes: Any) -> trl.SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "max_length": 32,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings | changes),
        train_dataset=texts.texts(),
        processing_class=texts.tokenizer(),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def adapters_moved_by(train: Callable[[], Any], model: nn.Module) -> set[str]:
    """The names of the adapters that training has changed."""
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    train()
    moved = [n for n, each in model.named_parameters() if not torch.equal(each, before[n])]
    return {name.split(".")[-2] for name in moved}


# --- row 3: training runs, and nothing learns ---------------------------------------------------


@pytest.fixture
def theirs(tmp_path: Path) -> str:
    peft.get_peft_model(models.tiny_llama(), their_config()).save_pretrained(tmp_path / "sft")
    return str(tmp_path / "sft")


def test_row_3_elsewhere_a_frozen_adapter_trains_to_the_end(theirs: str, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(models.tiny_llama(), theirs)
    # On by default there, and it is what keeps the backward from failing.
    trainer = their_trainer(model, tmp_path, gradient_checkpointing=True)
    assert adapters_moved_by(trainer.train, model) == set()
    told = [each for each in trainer.state.log_history if "loss" in each]
    assert len(told) == 2
    assert [each["grad_norm"] for each in told] == [0, 0]


def test_row_3_elsewhere_another_adapter_trains_than_was_meant(theirs: str, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(models.tiny_llama(), theirs, is_trainable=True)
    model.add_adapter("dpo", their_config())
    assert adapters_moved_by(their_trainer(model, tmp_path).train, model) == {"default"}
    # Both are wanted in the forward, so both are switched on; and both train.
    model.base_model.set_adapter(["default", "dpo"])
    assert adapters_moved_by(their_trainer(model, tmp_path).train, model) == {"default", "dpo"}


def freeze(model: PeftModel) -> None:
    model.requires_grad_(False)


def switch_off(model: PeftModel) -> None:
    model.set_adapter("first")
    for name, each in model.named_parameters():
        each.requires_grad_(".second." in name)


def train_the_parent_too(model: PeftModel) -> None:
    model.set_adapter(["first", "second"], train=["first", "second"])


def cut_off(model: PeftModel) -> None:
    """Whatever the last layer's values do, no gradient comes back to its factors."""
    layer = model.get_base_model().model.layers[-1].self_attn.v_proj
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs).detach()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (freeze, "0 trainable parameters"),
        (switch_off, "'second' is not active"),
        (train_the_parent_too, "no part of 'second'"),
        (cut_off, "2 adapter weights got no gradient"),
    ],
)
def test_row_3_a_run_ends_before_its_first_step(
    spoil: Callable[[PeftModel], None],
    told: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = plans.write_plan(tmp_path, [FIRST, SECOND], base=base)
    begin = stage._begin

    def spoilt(task: Any) -> PeftModel:
        model = begin(task)
        if task.stage.name == "second":
            spoil(model)
        return model

    heard = Steps()
    with monkeypatch.context() as patched:
        patched.setattr(stage, "_begin", spoilt)
        with pytest.raises(PreflightError) as caught:
            plans.run(path, console=heard)
    assert told in str(caught.value)
    assert heard.steps == {"first": 4}
    assert not (tmp_path / "out" / "second").exists()
    assert [each.status for each in status_of(tmp_path / "out").stages] == ["finished", "failed"]
    # Mended, the same plan keeps what is done and trains the rest.
    assert [each.status for each in plans.run(path).stages] == ["kept", "trained"]


def test_row_3_an_optimizer_of_something_else_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    monkeypatch.setattr(stage, "_loraplus", lambda *_: other)
    path = plans.write_plan(tmp_path, [FIRST], base=base)
    heard = Steps()
    with pytest.raises(PreflightError) as caught:
        plans.run(path, console=heard)
    # Two layers with two targets, A and B each.
    assert len(caught.value.faults) == 8
    assert all(fault.startswith("the optimizer has no ") for fault in caught.value.faults)
    assert heard.steps == {}


# --- row 4: nobody knows which adapters make up the final model ---------------------------------


@pytest.mark.slow
def test_row_4_the_last_directory_of_a_run_is_all_of_it(base: Path, tmp_path: Path) -> None:
    stages = [
        {"name": "sft", "method": "sft", "learning_rate": 0.2},
        {"name": "dpo", "method": "dpo", "mode": "stack", "lora_target_modules": ["o_proj"]},
    ]
    result = plans.run(plans.write_plan(tmp_path, stages, base=base))
    expected = answer(lamina.load(result.path, models.tiny_llama()))
    # The parent is gone, the rest moved away: it is opened by the real peft, as one adapter.
    alone = Path(result.path).rename(tmp_path / "handed over")
    shutil.rmtree(tmp_path / "out")
    opened = open_with_peft(alone)
    assert list(opened.peft_config) == ["default"]
    assert distance(answer(opened), expected) < 1e-6
    assert distance(answer(models.tiny_llama()), expected) > 1e-2
    record = lamina.lineage(alone)
    assert [(each.name, each.mode, each.data["method"]) for each in record.stages] == [
        ("sft", "fresh", "sft"),
        ("dpo", "stack", "dpo"),
    ]
    for each, rows in zip(record.stages, (16, 8), strict=True):
        assert each.data["rows"] == rows
        assert each.data["digest"]
        assert each.metrics["train_loss"] > 0
    lamina.verify(alone, models.tiny_llama()).raise_if_failed()


# --- row 16: resuming loses adapters, or keeps a stale alpha ------------------------------------


def test_row_16_elsewhere_another_alpha_goes_on_as_if_it_were_the_same(tmp_path: Path) -> None:
    for alpha, steps, resume in ((8, 2, None), (64, 4, str(tmp_path / "checkpoint-2"))):
        model = peft.get_peft_model(models.tiny_llama(), their_config(lora_alpha=alpha))
        their_trainer(model, tmp_path, max_steps=steps).train(resume_from_checkpoint=resume)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    # Factors that were trained at a scaling of 2 are multiplied by 16.
    assert layer.scaling == {"default": 16}


class Looking(transformers.TrainerCallback):
    """Remembers the B matrices that steps begin with."""

    found: dict[str, torch.Tensor]

    def on_train_begin(self, *args: Any, model: Any = None, **given: Any) -> None:
        named = model.named_parameters()
        self.found = {name: each.clone() for name, each in named if "lora_B" in name}


def test_row_16_elsewhere_the_second_of_two_adapters_is_not_resumed(tmp_path: Path) -> None:
    def two(steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
        model = peft.get_peft_model(models.tiny_llama(), their_config(), adapter_name="sft")
        model.add_adapter("dpo", their_config())
        model.base_model.set_adapter(["sft", "dpo"])
        trainer, looking = their_trainer(model, tmp_path, max_steps=steps), Looking()
        trainer.add_callback(looking)
        trainer.train(resume_from_checkpoint=resume)
        return looking.found

    two(2)
    # One of them is loaded and trains; the other one's optimizer state has nowhere to go.
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        two(4, str(tmp_path / "checkpoint-2"))


def interrupted(base: Path, folder: Path, *, at: int) -> Path:
    """A plan whose second stage was stopped at a step."""

    class Stopping(Told):
        def step(self, name: str, step: int, steps: int) -> None:
            if (name, step) == ("second", at):
                os.kill(os.getpid(), signal.SIGINT)

    path = plans.write_plan(folder, [FIRST, SECOND], base=base)
    assert plans.run(path, console=Stopping()).interrupted
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("stages.second.lora_alpha=64", {"second": "lora_alpha: 8.0 -> 64.0"}),
        (
            "stages.first.learning_rate=0.01",
            {"first": "learning_rate: 0.02 -> 0.01", "second": "the stage before changed"},
        ),
    ],
)
def test_row_16_what_changed_meanwhile_is_told_and_nothing_stale_goes_on(
    change: str, told: dict[str, str], base: Path, tmp_path: Path
) -> None:
    path = interrupted(base, tmp_path, at=3)
    heard = Steps()
    changed = plans.run(path, change, console=heard)
    assert heard.why == told
    # From its beginning, to the end that the new setting comes to by itself.
    assert heard.began == dict.fromkeys(told, 0)
    fresh = plans.run(path, change, f"output_dir={tmp_path / 'fresh'}")
    mine, theirs = plans.tensors(changed.path), plans.tensors(fresh.path)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_row_16_two_adapters_with_names_go_on_where_they_were(base: Path, tmp_path: Path) -> None:
    path = interrupted(base, tmp_path, at=3)
    checkpoint = tmp_path / "out" / "second.work" / "checkpoint-3"
    # A checkpoint is a stage like any other: both adapters, by their names.
    assert [each.name for each in lamina.lineage(checkpoint).stages] == ["first", "second"]
    heard = Steps()
    resumed = plans.run(path, console=heard)
    assert heard.began["second"] == 3
    whole = plans.run(path, f"output_dir={tmp_path / 'whole'}")
    mine, theirs = plans.tensors(resumed.path), plans.tensors(whole.path)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- row 17: gradient checkpointing kills the gradient ------------------------------------------


@pytest.mark.slow
def test_row_17_recomputing_in_a_plan_learns_what_it_learns_without(
    base: Path, tmp_path: Path
) -> None:
    stages = [FIRST, {**SECOND, "lora_target_modules": "all-linear"}]
    path = plans.write_plan(tmp_path, stages, base=base)
    plain = plans.tensors(plans.run(path).path)
    for reentrant in (True, False):
        asked = f"{{gradient_checkpointing_kwargs: {{use_reentrant: {str(reentrant).lower()}}}}}"
        result = plans.run(
            path,
            "defaults.gradient_checkpointing=true",
            f"defaults.trainer_args={asked}",
            f"output_dir={tmp_path / str(reentrant)}",
        )
        found = plans.tensors(result.path)
        assert found.keys() == plain.keys()
        for name, tensor in found.items():
            assert tensor.any(), name
            torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-6)
