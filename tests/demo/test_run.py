"""The demo as a whole, with few steps: what it writes is complete, and opens again."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lamina.demo.run import run_demo
from lamina.demo.show import change
from lamina.stages import lineage

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_three_stages_are_trained_measured_and_opened_again(tmp_path: Path) -> None:
    shown = io.StringIO()
    results = run_demo(tmp_path, steps=3, console=Console(file=shown, width=100))

    rows = ["base", "prose (fresh)", "code (stack)", "docstrings (continue)"]
    assert list(results.matrix) == rows
    for row, column in zip(list(results.matrix)[1:], results.columns, strict=True):
        moved = change(results.matrix, row, column)
        assert moved is not None
        assert moved < 0, f"{row} did not learn its own text"
    assert results.reload["lamina"] is not None
    assert results.reload["lamina"] < 1e-4
    assert results.reload["peft"] is not None
    assert results.reload["peft"] < 1e-4

    record = lineage(results.stages["docstrings"])
    assert [stage.mode for stage in record.stages] == ["fresh", "stack", "continue"]
    assert [lamina.stage for lamina in record.laminae] == ["prose", "docstrings"]
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text())["matrix"] == results.matrix
    text = (tmp_path / "demo.txt").read_text()
    assert "Held-out perplexity" in text
    assert "Held-out perplexity" in shown.getvalue()
