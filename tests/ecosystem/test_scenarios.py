"""The libraries around peft, with Lamina in its place, each in a process of its own.

What runs by default is a part; `make ecosystem` runs all, without peft and beside it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ecosystem.kept import PLACE

HERE = Path(__file__).parent
SCENARIOS = sorted((HERE / "scenarios").glob("*.py"))


def has_peft() -> bool:
    """Whether the real peft is installed here."""
    try:
        importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run(script: str, *arguments: str, **environment: str) -> str:
    """Run a script of this folder; returns what it printed, or fails with it."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{script} {' '.join(arguments)}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def scenario(file: Path, how: str, folder: Path, *, everything: bool) -> None:
    """Run a file of scenarios, and open what it leaves behind with the real peft."""
    kept = folder / "kept"
    kept.mkdir()
    chosen = ["-m", "ecosystem or not ecosystem"] if everything else []
    arguments = [how, str(file), "-q", f"--basetemp={folder / 'work'}", *chosen]
    run("drive.py", *arguments, **{PLACE: str(kept)})
    left = list(kept.glob("*.json"))
    if left and everything and has_peft():
        assert int(run("kept.py", str(kept))) == len(left)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("file", SCENARIOS, ids=lambda path: path.stem)
def test_some(file: Path, tmp_path: Path) -> None:
    scenario(file, "hidden", tmp_path, everything=False)


@pytest.mark.ecosystem
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["hidden", "visible", "late"])
@pytest.mark.parametrize("file", SCENARIOS, ids=lambda path: path.stem)
def test_all(file: Path, how: str, tmp_path: Path) -> None:
    if how == "visible" and not has_peft():
        pytest.skip("peft is not installed")
    scenario(file, how, tmp_path, everything=True)


@pytest.mark.ecosystem
@pytest.mark.timeout(600)
@pytest.mark.parametrize("trainer", ["trainer", "sft", "dpo"])
@pytest.mark.skipif(not has_peft(), reason="peft is not installed")
def test_losses_are_those_of_the_real_peft(trainer: str, tmp_path: Path) -> None:
    files = {side: tmp_path / f"{side}.json" for side in ("peft", "lamina")}
    for side, file in files.items():
        run("losses.py", side, trainer, str(file))
    theirs, ours = (json.loads(file.read_text()) for file in files.values())
    assert len(ours) == len(theirs) >= 4
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(set(theirs)) == len(theirs)
