from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_file_length.py"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_four_hundred_lines_pass_and_one_more_fails(tmp_path: Path) -> None:
    nested = tmp_path / "deep" / "file.py"
    nested.parent.mkdir()
    nested.write_text("x = 1\n" * 400)
    (tmp_path / "notes.md").write_text("\n" * 1000)
    assert check(tmp_path).returncode == 0
    nested.write_text("x = 1\n" * 401)
    failed = check(tmp_path)
    assert failed.returncode == 1
    assert "file.py: 401 lines" in failed.stdout
