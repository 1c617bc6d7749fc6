"""The measurement of streamed merges, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "streaming_merge.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_small_form(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--gigabytes", "0.03", "--repeat", "1", "--json", figures, "--directory", tmp_path]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["shards"] > 1
    assert found["same_tensors"] == found["tensors"] > 10
    assert found["base_untouched"]
    assert 0.4 < found["rows"]["stream, warm"]["verified"] <= 0.501
    assert found["rows"]["stream, warm"]["entries"] > 10_000
    assert "the same bit for bit in both ways" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]
