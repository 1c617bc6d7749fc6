"""A run that was cut off, however, comes to the end that it would have come to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.run import plans

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_undisturbed(tmp_path: Path) -> None:
    changes = {"lora_dropout": 0.2, "max_steps": 6}
    stages = [
        {"name": "a", "method": "sft", **changes},
        {"name": "b", "method": "dpo", "mode": "stack", **changes},
    ]
    plan = plans.write_plan(tmp_path, stages)
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.run.kills", str(plan), "5", "3"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) >= 4
    for name in ("a", "b"):
        mine = plans.tensors(tmp_path / "out" / name)
        undisturbed = plans.tensors(tmp_path / "undisturbed" / name)
        assert mine.keys() == undisturbed.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, undisturbed[key]), key
        steps = [each["step"] for each in plans.log_of(tmp_path, name)]
        assert steps == [1, 2, 3, 4, 5, 6, 6]
    assert not list((tmp_path / "out").glob("*.work"))
