from __future__ import annotations

from pathlib import Path

import pytest

from lamina.training.report.facts import facts_of
from lamina.training.report.heat import ShownMatrix, grade_of, shown_matrix


@pytest.fixture(scope="module")
def shown(finished: Path) -> ShownMatrix:
    return shown_matrix(facts_of(finished))


@pytest.mark.parametrize(
    ("share", "grade"),
    [
        (None, None),
        (0.0, 0),
        (0.0049, 0),
        (0.005, 1),
        (-0.02, -2),
        (0.06, 3),
        (-0.1999, -4),
        (0.2, 5),
        (float("inf"), 5),
        (float("-inf"), -5),
    ],
)
def test_grades_are_shares_of_the_score_before(share: float | None, grade: int | None) -> None:
    assert grade_of(share) == grade


def test_dead_ends_stand_among_the_stages_and_change_nothing_after_them(shown: ShownMatrix) -> None:
    names = [each.name if each else None for each in shown.columns]
    assert names == [None, "domain", "chat", "slang", "prefer"]
    docs = shown.rows[0]
    assert [each.value for each in docs.cells] == ["3.214", "2.861", "2.934", "3.804", "2.941"]
    # slang against chat, and prefer against chat too: 3.804 - 2.934, 2.941 - 2.934.
    assert [each.change for each in docs.cells] == ["", "−0.353", "+0.073", "+0.870", "+0.007"]
    assert [each.is_dead_end for each in docs.cells] == [False, False, False, True, False]
    # -10.98 %, 2.55 %, 29.7 % and 0.24 % of the score before, lower being better.
    assert [each.grade for each in docs.cells] == [None, 4, -2, -5, 0]


def test_higher_is_better_of_exact_match(shown: ShownMatrix) -> None:
    facts = shown.rows[2]
    assert [each.change for each in facts.cells] == ["", "+0.190", "+0.130", "−0.220", "−0.020"]
    assert [each.grade for each in facts.cells] == [None, 5, 5, -5, -2]
    assert (facts.gain, facts.forgetting) == ("+0.300", "0.020")


def test_the_task_of_a_stage_is_marked_there(shown: ShownMatrix) -> None:
    marked = [[cell.learnt_here for cell in row.cells].index(True) for row in shown.rows]
    assert marked == [1, 2, 1]
    assert [row.row.told for row in shown.rows] == [True, True, False]


def test_changes_within_the_errors_are_marked_and_not_hidden(shown: ShownMatrix) -> None:
    # 1.96 * sqrt(2) * 0.012 = 0.0333; the first two changed by less than 0.5 % at their end.
    assert [[cell.unsure for cell in row.cells] for row in shown.rows] == [
        [False, False, False, False, False],
        [False, False, False, False, False],
        [False, False, False, False, True],
    ]
    assert shown.rows[2].cells[4].grade == -2


def test_a_cell_says_all_in_words(shown: ShownMatrix) -> None:
    told = shown.rows[0].cells[1].title.splitlines()
    assert told[0] == "loss 2.861 ± 0.012, on 200 examples"
    assert told[1].startswith("11.0")
    assert told[1].endswith("better than the stage before")
    assert told[-1] == "perplexity: 17.479"
