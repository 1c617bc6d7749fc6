"""What the user's functions raise is one error, and the run goes on once they are mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamina.training.run.status import status_of
from tests.cli.made import lamina
from tests.training.run import plans
from tests.training.trainers.test_methods import EXTRA

BROKEN = """
calls = 0

def later(completions, **columns):
    global calls
    calls += 1
    if calls > 2:
        raise KeyError("nobody judges this")
    return [float(len(text)) for text in completions]
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def test_a_reward_that_fails_ends_the_run_with_one_message(tmp_path: Path) -> None:
    """The function lies beside the plan; nobody works in its folder."""
    stages = [
        {"name": "first", "method": "pt"},
        {"name": "own", "method": "grpo", "mode": "stack", **EXTRA["grpo"], "save_steps": 1},
    ]
    path = plans.write_plan(tmp_path, stages)
    (tmp_path / "rewards.py").write_text(BROKEN)
    done = lamina("run", path)
    assert done.exit_code == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "Stage 'own' ended in KeyError: 'nobody judges this'" in done.stderr
    assert "rewards.py, line 8" in " ".join(done.stderr.split())
    file = tmp_path / "out" / "logs" / "own.traceback.txt"
    assert 'raise KeyError("nobody judges this")' in file.read_text()
    first, own = status_of(tmp_path / "out").stages
    assert (first.status, own.status) == ("finished", "failed")
    assert "KeyError" in own.why
    assert "ended in KeyError" in " ".join(lamina("status", tmp_path / "out").stdout.split())
    (tmp_path / "rewards.py").write_text(BROKEN.replace("> 2", "> 99"))
    done = lamina("run", path, "--json")
    assert done.exit_code == 0, done.stderr
    assert [each["status"] for each in json.loads(done.stdout)["stages"]] == ["kept", "trained"]
    assert "4/4" in lamina("status", tmp_path / "out").stdout
    lines = lamina("logs", tmp_path / "out", "own").stdout.splitlines()
    assert all(line.startswith("own ") for line in lines)
    assert "reward" in lines[0]
