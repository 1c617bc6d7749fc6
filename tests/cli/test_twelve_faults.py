"""A plan with twelve faults: one message with all of them, by lines, from the command itself."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.plan.test_reading import TWELVE

LINES = [3, 5, 6, 9, 12, 15, 16, 17, 18, 19, 23, 25]


def seconds() -> float:
    """Of the processor, that children which ended have used: others on the machine don't count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "words", [["validate"], ["run"], ["validate", "--json"], ["run", "--json"]]
)
def test_all_at_once_and_in_less_than_two_seconds(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(TWELVE)
    before = seconds()
    done = subprocess.run(
        [sys.executable, "-m", "lamina", words[0], "plan.yaml", *words[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert seconds() - before < 2
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    told = re.findall(r"^ +- line (\d+): ", done.stderr, re.MULTILINE)
    assert [int(number) for number in told] == LINES
    assert done.stderr.count("plan.yaml") == 1
    # Nothing was begun.
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
