"""Losses that are no numbers: they are told, and those after them are what they are."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from lamina.training.report.curves import curve_of
from lamina.training.run.log import read_log
from lamina.training.run.tally import Tally
from tests.training.run import plans


def test_a_loss_that_is_no_number_is_told_and_the_next_is_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plans.write_plan(tmp_path, [{"name": "a", "method": "pt"}])
    plans.run(path, f"output_dir={tmp_path / 'whole'}")
    step = Trainer.training_step

    def breaking(self: Any, *args: Any, **given: Any) -> torch.Tensor:
        loss: torch.Tensor = step(self, *args, **given)
        return loss * math.nan if self.state.global_step == 1 else loss

    monkeypatch.setattr(Trainer, "training_step", breaking)
    plans.run(path)
    broken, whole = (
        [line["loss"] for line in read_log(tmp_path / out / "logs" / "a.jsonl") if "loss" in line]
        for out in ("out", "whole")
    )
    # Not the mean of those that are numbers, which would be 0 here.
    assert broken == [whole[0], None, *whole[2:]]
    assert curve_of(tmp_path / "out" / "logs" / "a.jsonl").broken == (2,)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_comes_after_a_loss_that_is_no_number_is_counted_from_nothing(broken: float) -> None:
    trainer = SimpleNamespace(_tr_loss=torch.tensor(broken))
    tally = Tally({})
    tally.follow(trainer)
    tally.on_log(None, None, None, logs={"eval_loss": 1.0})
    # The mean that it belongs to isn't told yet.
    assert not trainer._tr_loss.isfinite()
    trainer._tr_loss -= trainer._tr_loss
    tally.on_log(None, None, None, logs={"loss": broken})
    assert trainer._tr_loss == 0
