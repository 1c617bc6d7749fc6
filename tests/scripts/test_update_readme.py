"""Measured figures get between the markers of the README, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamina.training.evaluate.scores import Answer, Evaluation, Judged, Measured, Score
from lamina.training.run.state import RunState, StageState
from scripts.update_readme import put_between, update

README = """before
<!-- demo:begin -->
old
<!-- demo:end -->
between
<!-- bench:begin -->
<!-- bench:end -->
after
"""
RESULTS = {
    "columns": ["prose", "code"],
    "matrix": {"base": {"prose": 30.126, "code": 12.0}, "stage 1": {"prose": 20.0, "code": 13.5}},
    "reload": {"lamina": 0.0, "peft": 3.1e-6},
    "seconds": 99.6,
}
BENCHMARK = {
    "machine": {"cpu": "a fast one", "cores": 2},
    "rows": [{"name": "import", "unit": "s", "peft": 3000.0, "lamina": 0.5, "ratio": 6000.0}],
}


def test_figures_get_between_the_markers_twice_the_same(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    demo = tmp_path / "runs" / "demo"
    demo.mkdir(parents=True)
    (demo / "results.json").write_text(json.dumps(RESULTS))
    (demo / "demo.txt").write_text("a table \\1\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmark.json").write_text(json.dumps(BENCHMARK))

    assert update(tmp_path) == ["demo", "bench"]
    text = readme.read_text()
    assert "| base | 30.13 | 12.00 |" in text
    assert "within 3.1e-06 with peft" in text
    assert "a table \\1" in text
    assert "| import | 3,000 s | 0.500 s | 6,000 |" in text
    assert "cpu a fast one, cores 2" in text
    assert "old" not in text
    assert [line for line in text.splitlines() if line in ("before", "between", "after")] == [
        "before",
        "between",
        "after",
    ]
    update(tmp_path)
    assert readme.read_text() == text


def test_what_streaming_took_gets_into_its_guide(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs").mkdir()
    guide = tmp_path / "docs" / "trust.md"
    guide.write_text("<!-- streaming:begin -->\n<!-- streaming:end -->\n")
    measured = {
        "checkpoint_bytes": 3_970_000_000,
        "shards": 5,
        "rank": 16,
        "tensors": 219,
        "same_tensors": 219,
        "cpus": 2,
        "torch": "2.13",
        "rows": {
            "copy": {"seconds": 5.6, "megabytes_per_second": 708.2},
            "stream": {"seconds": 12.25, "megabytes_per_second": 324.0, "peak": 621_740_032},
        },
    }
    (tmp_path / "docs" / "streaming_merge.json").write_text(json.dumps(measured))
    assert update(tmp_path) == ["streaming"]
    text = guide.read_text()
    assert "| copy | 5.6 | 708 |  |" in text
    assert "| stream | 12.2 | 324 | 622 |" in text
    assert "219 of 219 tensors" in text


def test_nothing_measured_leaves_the_readme_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    assert update(tmp_path) == []
    assert (tmp_path / "README.md").read_text() == README


def test_a_marker_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        put_between("no markers", "demo", "section")


def test_the_readme_has_the_markers() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    for name in ("demo", "bench", "example"):
        assert "\n\nx\n\n" in put_between(text, name, "x")


def test_the_matrix_and_the_answers_of_the_example_get_into_the_readme(tmp_path: Path) -> None:
    told = "before <!-- example:begin --> old <!-- example:end -->"
    picture = "![x](docs/images/support-bot-matrix.png)"
    (tmp_path / "README.md").write_text(f"{told}\n{picture}\n")
    example = tmp_path / "examples" / "support-bot"
    example.mkdir(parents=True)
    (example / "plan.yaml").write_text("output_dir: x\nstages:\n  - {name: a}\n\nevals: {}\n")
    run = tmp_path / "runs" / "support-bot"
    (run / "report").mkdir(parents=True)
    (run / "report" / "matrix.png").write_bytes(b"a picture")

    def judged(loss: float, share: float, answer: str) -> Judged:
        scores = {
            "manual": Measured("1", Score("loss", loss, False, 9)),
            "answers": Measured("2", Score("exact_match", share, True, 9)),
        }
        return Judged("w", scores, (Answer("Who?", answer, 2, True),), seconds=2.0)

    stages = {"a": judged(1.25, 0.5, "a|b\nc")}
    Evaluation(judged(3.0, 0.0, "x"), stages, ("manual", "answers"), {}).write(run)
    RunState(order=("a",), stages={"a": StageState("finished", "h", {}, seconds=40.0)}).write(run)

    assert update(tmp_path) == ["example"]
    text = (tmp_path / "README.md").read_text()
    assert "```yaml\nstages:\n  - {name: a}\n```" in text
    assert "| manual (loss) | 3.00 | 1.25 | a |" in text
    assert "| answers (exact match) | 0% | 50% | a |" in text
    assert "| Who? | `a\\|b c` |" in text
    assert "All of it took 42 s." in text
    copied = tmp_path / "docs" / "images" / "support-bot-matrix.png"
    assert copied.read_bytes() == b"a picture"
