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
