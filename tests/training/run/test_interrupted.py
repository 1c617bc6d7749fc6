"""Every method, stopped in the middle of a stage, comes to the end of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.training.run import Told
from tests.training.run import plans
from tests.training.trainers.test_methods import EXTRA, REWARDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
FIRST = {"name": "first", "method": "pt"}


class Stopping(Told):
    """Ctrl-C at a step of the stage "own"."""

    def __init__(self, at: int) -> None:
        self._at = at

    def step(self, name: str, step: int, steps: int) -> None:
        if (name, step) == ("own", self._at):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("interrupted")
    (made / "rewards.py").write_text(REWARDS)
    plans.write_base(made / "base")
    return made


def differing(folder: Path, own: dict[str, Any], at: int = 3) -> list[str]:
    """Names of tensors that a stopped run has otherwise than an undisturbed one."""
    own = {"name": "own", "lora_dropout": 0.2, **EXTRA.get(own["method"], {}), **own}
    if own["mode"] == "continue":
        del own["lora_dropout"]
    ends = []
    for output, told in (("undisturbed", None), ("stopped", Stopping(at))):
        out = f"{output}-{len(list(folder.iterdir()))}"
        path = plans.write_plan(folder, [FIRST, own], base=folder / "base", output_dir=out)
        result = plans.run(path, console=told)
        if told is not None:
            assert result.stages[-1].status == "interrupted"
            result = plans.run(path)
            assert result.stages[-1].why == f"went on from step {at}"
        ends.append(plans.tensors(result.path))
    mine, theirs = ends
    return [name for name in mine | theirs if not torch.equal(mine[name], theirs[name])]


@pytest.mark.parametrize("method", ["pt", "sft", "dpo", "kto", "orpo", "reward", "grpo"])
def test_a_method_goes_on_bit_for_bit(method: str, folder: Path) -> None:
    assert differing(folder, {"method": method, "mode": "stack"}) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "continue"},
        {"mode": "merge"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"loraplus_lr_ratio": 4.0},
        {"neftune_noise_alpha": 5.0},
        {"packing": True, "max_length": 16, "max_steps": 6, "per_device_train_batch_size": 1},
        {"gradient_checkpointing": True},
        {
            "eval_fraction": 0.25,
            "eval_steps": 1,
            "early_stopping_patience": 2,
            "learning_rate": 3.0,
            "max_steps": 30,
            "save_steps": 1,
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_choice_goes_on_bit_for_bit(changes: dict[str, Any], folder: Path) -> None:
    at = 2 if "early_stopping_patience" in changes else 3
    assert differing(folder, {"method": "sft", "mode": "stack", **changes}, at) == []


def test_a_line_of_the_log_is_of_all_its_steps(folder: Path) -> None:
    """Stopped between two lines: the next one still tells the mean of what came before."""
    own = {"name": "own", "method": "sft", "mode": "stack", "logging_steps": 3, "max_steps": 6}
    told = []
    for output, console in (("lines", None), ("cut-lines", Stopping(5))):
        path = plans.write_plan(folder, [FIRST, own], base=folder / "base", output_dir=output)
        if plans.run(path, console=console).interrupted:
            plans.run(path)
        log = (folder / output / "logs" / "own.jsonl").read_text().splitlines()
        told.append([line for line in map(json.loads, log) if "loss" in line])
    whole, cut = told
    assert [line["step"] for line in cut] == [1, 3, 6]
    for name in ("loss", "num_tokens", "entropy", "mean_token_accuracy"):
        assert [line[name] for line in cut] == [line[name] for line in whole], name
    assert (
        cut[-1]["loss"] == lamina.lineage(folder / "cut-lines" / "own").newest.metrics["train_loss"]
    )
