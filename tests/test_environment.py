"""What is told of the machine is what the machine says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lamina import environment
from lamina.environment import describe_environment


def test_is_plain_json() -> None:
    told = json.loads(json.dumps(describe_environment(with_torch=True).to_dict()))
    assert told["packages"]["typer"]
    assert told["cores"] == os.cpu_count()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells its processor's flags")
def test_features_are_the_processors() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    found = describe_environment().cpu_features
    assert set(found) <= set(flags)
    assert ("avx2" in found) == ("avx2" in flags)


def test_a_system_that_tells_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise OSError

    monkeypatch.setattr(environment, "_CPUINFO", Path("/nowhere"))
    monkeypatch.setattr(environment.os, "sysconf", refuse)
    found = describe_environment()
    assert found.cpu_features == ()
    assert found.memory_bytes is None
