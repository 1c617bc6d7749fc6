"""The page on reliability says what the figures say."""

from __future__ import annotations

from typing import Any

from scripts.reliability import page, table

RUN = {"date": "2026-11-24", "machine": {"cpu": "a fast one", "cores": 2}}


def section(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**RUN, **changes, "rows": list(rows)}


def test_a_column_for_each_figure_seconds_last() -> None:
    rows = [
        {"what": "merge", "kills": 1200, "seconds": 2.5, "mixtures": 0},
        {"what": "edit", "kills": 7, "seconds": 1.0, "errors": {"RecordError": 3}},
    ]
    assert table(rows).splitlines() == [
        "| what | kills | mixtures | errors | seconds |",
        "| --- | ---: | ---: | --- | ---: |",
        "| merge | 1,200 | 0 |  | 2.5 |",
        "| edit | 7 |  | RecordError 3 | 1.0 |",
    ]


def test_totals_are_over_all_kinds_of_kills() -> None:
    figures = {
        "kills": section({"what": "a", "kills": 200, "mixtures": 0}),
        "steps": section({"what": "a", "kills": 41, "mixtures": 2}, {"what": "b", "kills": 5}),
        "mutants in all": section({"mutants": 5000, "readings": 70000}),
    }
    text = page(figures)
    assert "- 246 kills, 2 mixtures." in text
    assert "- 5,000 broken directories, read 70,000 times" in text
    assert "disk was really full" not in text
    assert text.index("random instants") < text.index("before every change") < text.index("repeat")
    assert "- all: 2026-11-24; cpu a fast one, cores 2." in text


def test_sections_of_different_runs_are_told_apart() -> None:
    figures = {
        "kills": section({"what": "a", "kills": 1}),
        "something new": section({"what": "a"}, date="2027-01-01"),
    }
    text = page(figures)
    assert "- kill -9 at random instants: 2026-11-24; " in text
    assert "- Something new: 2027-01-01; " in text
    assert "## Something new\n" in text
