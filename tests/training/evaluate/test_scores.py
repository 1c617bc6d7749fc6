"""What was measured, on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lamina.errors import RunError
from lamina.training.evaluate.scores import (
    FILE,
    Answer,
    Evaluation,
    Judged,
    Measured,
    ModuleDrift,
    Score,
)


def whole() -> Evaluation:
    score = Score("loss", 1.5, False, 3, 0.25, {"perplexity": 4.5, "margin": -math.inf})
    base = Judged(
        "b", {"a": Measured("h", score, 0.5)}, (Answer("Hi", "<there> \udce9", 2, True),), "p"
    )
    drift = (ModuleDrift("q", 1.0, 4.0, 1.5, 2, 0.25, 0.5), ModuleDrift("v", 0.0, None, 0.0, 0))
    broken = Score("judge:score", math.nan, True, 1)
    stage = Judged("s", {"a": Measured("h", None), "b": Measured("i", broken)}, drift=drift)
    return Evaluation(base, {"one": stage}, ("a", "b"), {"a": "one"})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    whole().write(tmp_path)
    found = Evaluation.read(tmp_path)
    assert repr(found) == repr(whole())
    assert found.stages["one"].drift is not None
    assert found.stages["one"].drift[0].relative == 0.25
    assert found.stages["one"].drift[1].relative is None
    # It is JSON to everybody: no NaN, no Infinity.
    json.loads((tmp_path / FILE).read_text(), parse_constant=pytest.fail)


def test_nothing_is_nothing(tmp_path: Path) -> None:
    assert Evaluation.read(tmp_path) == Evaluation()
    assert Evaluation().of("one") is None
    assert Evaluation().of(None) == Judged()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "base": 3, "stages": 4}']
)
def test_what_is_no_evaluation_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RunError, match=r"evaluation\.json can't be read") as caught:
        Evaluation.read(tmp_path)
    assert "delete it" in str(caught.value.cure)


def test_one_of_them_is_replaced() -> None:
    other = Judged("other")
    found = whole().having("one", other).having(None, other)
    assert (found.base, found.of("one")) == (other, other)
    assert whole().of("one") != other


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        (("stages", "one", "scores", "b", "score", "value"), "much", "stages.one.scores.b.score"),
        (("stages", "one", "scores", "b", "score", "value"), None, "stages.one.scores.b.score"),
        (("stages", "one", "drift", 0, "norm"), "far", "stages.one.drift.0.norm"),
        (("base", "answers", 0, "text"), 3, "base.answers.0.text"),
    ],
)
def test_what_is_of_another_type_is_refused_where_it_is_read(
    tmp_path: Path, where: tuple[str | int, ...], value: object, told: str
) -> None:
    whole().write(tmp_path)
    document = json.loads((tmp_path / FILE).read_text())
    place = document
    for each in where[:-1]:
        place = place[each]
    place[where[-1]] = value
    (tmp_path / FILE).write_text(json.dumps(document))
    with pytest.raises(RunError, match="makes no sense") as caught:
        Evaluation.read(tmp_path)
    assert caught.value.faults[0].startswith(told)
    assert "delete it" in str(caught.value.cure)


def test_numbers_of_drift_that_are_none_come_back_as_such(tmp_path: Path) -> None:
    drift = (ModuleDrift("q", 1.0, math.inf, math.nan, 2),)
    Evaluation(stages={"one": Judged("s", drift=drift)}).write(tmp_path)
    found = Evaluation.read(tmp_path).stages["one"].drift
    assert found is not None
    assert found[0].relative == 0.0
    assert math.isnan(found[0].effective_rank or 0.0)
