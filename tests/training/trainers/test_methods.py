"""Every method trains a stage on a parent, end to end, and what is saved is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lamina
from tests import models
from tests.training.run import plans

METHODS = ("pt", "sft", "dpo", "kto", "orpo", "reward", "grpo")
EXTRA: dict[str, dict[str, Any]] = {
    "grpo": {
        "reward_functions": ["rewards:later"],
        "num_generations": 4,
        "max_completion_length": 6,
        "temperature": 1.5,
        "beta": 0.1,
        "max_length": None,
    },
    "orpo": {"max_length": 40},
}
REWARDS = """
def later(completions, **columns):
    return [sum(len(word) + ord(word[-1]) for word in text.split()) / 9 for text in completions]
"""
# TRL's experimental trainer asks pandas and torch in older ways.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and what a first stage came to."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "rewards.py").write_text(REWARDS)
    plans.write_base(folder / "base")
    return folder


def stages_of(method: str, mode: str) -> list[dict[str, Any]]:
    own = {"name": method, "method": method, "mode": mode, **EXTRA.get(method, {})}
    return [{"name": "first", "method": "pt"}, own]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_a_stage(method: str, parent: Path) -> None:
    path = plans.write_plan(parent, stages_of(method, "stack"), base=parent / "base")
    result = plans.run(path)
    assert [each.status for each in result.stages][1] == "trained"
    lines = [each for each in plans.log_of(parent, method) if "loss" in each]
    assert [each["step"] for each in lines] == [1, 2, 3, 4]
    assert all(each["loss"] is not None for each in lines)
    record = lamina.lineage(result.path)
    assert [each.name for each in record.stages] == ["first", method]
    assert record.newest.data["method"] == method
    kept, trained = _ranks(parent / "out" / "first"), _ranks(result.path)
    for module, (a, b) in kept.items():
        more_a, more_b = trained[module]
        assert torch.equal(more_a[:4], a)
        assert torch.equal(more_b[:, :4], b)
        assert more_b[:, 4:].abs().max() > 0


def _ranks(stage: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = plans.tensors(stage)
    ends = ".lora_A.weight"
    names = [name.removesuffix(ends) for name in found if name.endswith(ends)]
    return {n: (found[n + ends], found[f"{n}.lora_B.weight"]) for n in names}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "start"), [("dpo", 0.6931), ("kto", 0.5)])
def test_a_preference_begins_at_its_parent(method: str, start: float, parent: Path) -> None:
    """Policy and reference are equal at first, so the first loss is known."""
    for mode in ("stack", "continue", "merge"):
        path = plans.write_plan(
            parent, stages_of(method, mode), base=parent / "base", output_dir=f"out-{mode}"
        )
        plans.run(path)
        log = parent / f"out-{mode}" / "logs" / f"{method}.jsonl"
        first = json.loads(log.read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(start, abs=1e-4), mode


@pytest.mark.slow
def test_the_base_as_reference_is_another_start(parent: Path) -> None:
    stages = stages_of("dpo", "stack")
    stages[0]["max_steps"], stages[0]["learning_rate"] = 12, 0.2
    losses = {}
    for reference in ("base", "parent", "first"):
        stages[1]["reference"] = reference
        path = plans.write_plan(parent, stages, base=parent / "base", output_dir=f"by-{reference}")
        plans.run(path)
        log = (parent / f"by-{reference}" / "logs" / "dpo.jsonl").read_text().splitlines()
        losses[reference] = json.loads(log[0])["loss"]
    assert losses["parent"] == losses["first"] == pytest.approx(0.6931, abs=1e-4)
    assert abs(losses["base"] - 0.6931) > 1e-3


@pytest.mark.slow
def test_a_reward_model_answers_with_one_number(parent: Path) -> None:
    path = plans.write_plan(parent, stages_of("reward", "stack"), base=parent / "base")
    result = plans.run(path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        parent / "base", num_labels=1
    )
    model = lamina.load(result.path, base)
    assert model(input_ids=models.token_ids()).logits.shape == (2, 1)
    assert any("score" in name for name in plans.tensors(result.path))


@pytest.mark.slow
def test_grpo_is_held_to_its_parent(parent: Path) -> None:
    """What is told of the distance to the reference begins at nothing, and grows."""
    stages = stages_of("grpo", "continue")
    stages[1]["learning_rate"] = 0.2
    path = plans.write_plan(parent, stages, base=parent / "base", output_dir="held")
    plans.run(path)
    log = (parent / "held" / "logs" / "grpo.jsonl").read_text().splitlines()
    distances = [each["kl"] for each in map(json.loads, log) if "kl" in each]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[-1] > 1e-5
