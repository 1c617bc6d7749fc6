"""A save of a stage that is killed at any moment leaves the old stage or the new one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lamina
from lamina.stages import lineage, load
from tests.stages.chains import config_of, tensors_of, wide

HERE = Path(__file__).parent
KILLS = 50


def version(path: Path) -> int:
    """The number that config, record and all tensors of a stage agree on."""
    record = lineage(path)
    (stage,) = record.stages
    assert isinstance(stage.data, int)
    assert stage.metrics == {"number": stage.data}
    assert record.laminae[0].config["lora_dropout"] == stage.data / 1e6
    assert config_of(path)["lora_dropout"] == stage.data / 1e6
    tensors = tensors_of(path)
    assert len(tensors) == 2
    assert all(bool((tensor == stage.data).all()) for tensor in tensors.values())
    assert load(path, wide()).active_adapters == ["chat"]
    return stage.data


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_random_moments_of_saving_a_stage(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "chat"
    paths = (HERE.parents[1], Path(lamina.__file__).parents[1])
    saver = subprocess.Popen(
        [sys.executable, str(HERE / "save_forever.py"), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    assert saver.stdin is not None
    assert saver.stdout is not None
    moments = random.Random(0)
    versions: list[int] = []
    with saver:
        # However busy the machine is, a child gets about one save done, sooner or later.
        longest = 2.5 * float(saver.stdout.readline())
        for _ in range(KILLS):
            print(file=saver.stdin, flush=True)
            child = int(saver.stdout.readline())
            time.sleep(moments.uniform(0, min(longest, 0.5)))
            os.kill(child, signal.SIGKILL)
            assert saver.stdout.readline() == "dead\n"
            versions.append(version(path))
            if versions[-2:-1] == versions[-1:]:
                longest *= 1.2
        saver.stdin.close()
    assert saver.returncode == 0
    # Each child went on where the directory stood, or died before its first save was published.
    assert versions == sorted(versions)
    assert len(set(versions)) > KILLS / 5
    left = [entry.name for entry in path.parent.iterdir()]
    assert all(name == "chat" or name.startswith(".") for name in left)
    assert {entry.name for entry in path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
