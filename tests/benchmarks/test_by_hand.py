"""A plan comes to the losses that the same stages come to by hand with peft and TRL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.by_hand.__main__ import main


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("case", "most"),
    [
        # Dropout draws the same numbers; the frozen stage below is summed in the same order.
        ("stack:0.1", 0.0),
        # By hand the third stage is laid over the merged base, here over both stages' ranks.
        ("merge:0", 1e-5),
    ],
)
def test_by_hand_and_as_a_plan(
    case: str, most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--steps", "6", "--only", case, "--json", str(tmp_path / "figures.json")])
    told = json.loads((tmp_path / "figures.json").read_text())
    assert told["largest difference"] <= most
    figures = [(row["stage"], row["what"]) for row in told["rows"]]
    for stage in ("domain", "chat", "taste"):
        assert {"loss, step 6", "held-out loss"} <= {w for name, w in figures if name == stage}
    # The stages did learn: what is compared is not where they began.
    last = {row["stage"]: row["lamina"] for row in told["rows"] if row["what"] == "loss, step 6"}
    assert last["domain"] < 5.3
    assert last["taste"] != pytest.approx(0.6931, abs=1e-4)
    assert "largest difference" in capsys.readouterr().out
