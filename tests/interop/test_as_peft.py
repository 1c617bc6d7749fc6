"""`lamina as-peft`: a script runs as it would by itself, and peft is Lamina."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
if __name__ != "__main__":
    raise SystemExit("not the main module")
import beside
from peft import LoraConfig
print(*sys.argv[1:], LoraConfig.__module__.split(".")[0], beside.value)
sys.exit(7)
"""


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "lamina", "as-peft", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("value = 'found'")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("what", [("script.py",), ("-m", "script")])
def test_arguments_and_exit_code_pass_through(folder, what):
    done = run(folder, *what, "--help", "-x", "1")

    assert done.stdout.strip() == "--help -x 1 lamina found"
    assert done.returncode == 7


def test_a_missing_script_is_told(folder):
    done = run(folder, "nothing.py")

    assert done.returncode == 2
    assert "There is no nothing.py" in done.stderr


def test_it_asks_for_a_script(folder):
    assert run(folder).returncode == 2
