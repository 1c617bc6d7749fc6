"""What a plan may say, and a run doesn't do yet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamina.errors import LaminaError
from tests.training.run import plans


def test_what_a_run_does_not_do_yet_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    path = plans.write_plan(
        tmp_path, [{"name": "a", "method": "pt", "gate": {"may_lose": {"x": 0.1}}}]
    )
    asked = {"evals": {"x": {"datasets": "x.txt"}}, "prompts": ["Once"]}
    path.write_text(
        path.read_text() + "\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in asked.items())
    )
    with pytest.raises(LaminaError) as caught:
        plans.run(path)
    assert [each.partition(": ")[0] for each in caught.value.faults] == ["a", "evals", "prompts"]
    assert not (tmp_path / "out").exists()
