from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamina.storage import atomic
from lamina.storage.atomic import recover
from tests.storage.directories import (
    CONFIG,
    KEPT,
    WEIGHTS,
    hidden,
    save,
    tree,
)

HERE = Path(__file__).parent


def with_lamina() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[2])}


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=with_lamina(),
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["exchange", "renames"])
def test_a_kill_before_any_step_leaves_the_old_or_the_new(tmp_path: Path, kind: str) -> None:
    output, errors = child("crash_every_step.py", tmp_path / "work", kind).communicate(timeout=60)
    assert errors == ""
    crashes = [json.loads(line) for line in output.splitlines()]
    kept = {
        "tokenizer.json": "tokens",
        f"checkpoint-1/{CONFIG}": "first",
        "latest": "checkpoint-1",
    }
    old = {WEIGHTS: "old", CONFIG: "old", "adapter_model.bin": "stale", **kept}
    new = {WEIGHTS: "new", CONFIG: "new", **kept}
    outcomes = [crash["after"] for crash in crashes]
    turn = outcomes.index(new)
    assert 5 < turn < len(outcomes) - 1
    assert outcomes == [old] * turn + [new] * (len(outcomes) - turn)
    assert all(crash["killed"] for crash in crashes[:-1])
    # Only the way without an exchange needs the reader's help, and only at one step.
    assert sum(crash["absent"] for crash in crashes) == (1 if kind == "renames" else 0)
    for crash in crashes:
        assert crash["next"] == {WEIGHTS: "next", CONFIG: "next", **kept}
        assert crash["left"] == []


@pytest.mark.parametrize(("kind", "kills"), [("exchange", 30), ("renames", 15)])
def test_kill_9_at_random_moments(run: Path, kind: str, kills: int) -> None:
    moments = random.Random(0)
    versions = set()
    for _ in range(kills):
        process = child("save_forever.py", run, kind)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        if kind == "renames":
            recover(run)
        found = tree(run)
        weights, config = found.pop(WEIGHTS), found.pop(CONFIG)
        assert weights == f"{config} " * 20_000
        assert found == KEPT
        versions.add(config)
    assert len(versions) > 1
    save(run, "new")
    assert hidden(run.parent) == []


def test_the_writer_needs_no_torch() -> None:
    code = "import sys, lamina.storage.atomic, lamina.storage.source; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=with_lamina()
    )
    assert "torch" not in loaded.stdout.split()
    assert "huggingface_hub" not in loaded.stdout.split()
