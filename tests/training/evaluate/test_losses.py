"""A loss is what the trainer of a stage would say of the same examples."""

from __future__ import annotations

import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from torch.nn.functional import cross_entropy

from lamina.errors import PlanError
from lamina.training.data import prepare
from lamina.training.evaluate.losses import Texts
from lamina.training.plan.settings import Settings
from tests import models
from tests.ecosystem import texts
from tests.training.data.test_prepare import MARKED
from tests.training.data.written import jsonl, said
from tests.training.evaluate.asked import plan, prepare_evals, prepared, score

SFT = {"name": "two", "method": "sft", "datasets": "a.jsonl", "mode": "stack"}
TALKS = [
    {
        "messages": [
            said("user", texts.sentence(row)),
            said("assistant", texts.sentence(row + 5, 3 + row)),
            said("user", "w1 w2"),
            said("assistant", "w9 w8"),
        ]
    }
    for row in range(5)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": texts.sentence(row, 3 + 2 * row)} for row in range(7)],
    "messages": TALKS,
    "sharegpt": [
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
                for m in row["messages"]
            ]
        }
        for row in TALKS
    ],
    "alpaca": [
        {"instruction": texts.sentence(row), "input": "w3", "output": texts.sentence(row, 2 + row)}
        for row in range(5)
    ],
    "prompt_completion": [
        {"prompt": texts.sentence(row, 4), "completion": " " + texts.sentence(row + 9, 2 + row)}
        for row in range(5)
    ],
}


def trainers_own(folder: Path, rows: list[dict[str, Any]], max_length: int) -> float:
    """The loss that TRL's trainer evaluates to; one batch, so that its mean is over tokens."""
    path = str(jsonl(folder / "own.jsonl", rows))
    settings = Settings(method="sft", datasets=[path])  # type: ignore[list-item]
    data = prepare(settings, tokenizer=texts.tokenizer(), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = trl.SFTConfig(
            output_dir=str(folder / "trl"),
            max_length=max_length,
            use_cpu=True,
            report_to=[],
            per_device_eval_batch_size=len(rows),
            bf16=False,
            disable_tqdm=True,
        )
        trainer = trl.SFTTrainer(
            model=models.tiny_llama(),
            args=args,
            train_dataset=data.train,
            eval_dataset=data.train,
            processing_class=texts.tokenizer(),
        )
        return float(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("max_length", [64, 9])
def test_the_loss_is_that_of_the_trainer(tmp_path: Path, layout: str, max_length: int) -> None:
    held = prepared(tmp_path, ROWS[layout], max_length=max_length)
    found = score(held, models.tiny_llama(), batch_size=3)
    expected = trainers_own(tmp_path, ROWS[layout], max_length)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.details["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert not found.higher_is_better


def test_tokens_are_weighed_alike_and_examples_give_the_error(tmp_path: Path) -> None:
    held = prepared(tmp_path, ROWS["text"])
    model, tokenizer = models.tiny_llama(), texts.tokenizer()
    sums, counts = [], []
    for row in ROWS["text"]:
        ids = torch.tensor([*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        sums.append(float(cross_entropy(logits, ids[1:], reduction="sum")))
        counts.append(len(ids) - 1)
    found = score(held, model, batch_size=4)
    assert found.value == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    assert found.details["tokens"] == sum(counts)
    assert found.examples == len(sums)
    # Against the spread of the ratio over draws of examples, with replacement.
    draw = random.Random(0)
    ratios = []
    for _ in range(4_000):
        drawn = draw.choices(range(len(sums)), k=len(sums))
        ratios.append(sum(sums[i] for i in drawn) / sum(counts[i] for i in drawn))
    spread = torch.tensor(ratios).std().item()
    # The spread of draws has n where the unbiased one has n - 1.
    spread *= math.sqrt(len(sums) / (len(sums) - 1))
    assert found.error == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_batch_size_means_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    held = prepared(tmp_path, ROWS["text"])
    model = models.tiny_llama().to(dtype)
    one, three, all_ = (score(held, model, batch_size=size).value for size in (1, 3, 99))
    near = 1e-6 if dtype is torch.float32 else 2e-3
    assert one == pytest.approx(three, rel=near) == pytest.approx(all_, rel=near)


def test_one_example_has_no_error(tmp_path: Path) -> None:
    assert score(prepared(tmp_path, ROWS["text"][:1]), models.tiny_llama()).error is None


def test_masks_are_those_of_the_stage_whose_task_it_is(tmp_path: Path) -> None:
    counts = {}
    for name, stage in {
        "stage": {**SFT, "assistant_only_loss": True},
        "other": SFT,
        "completions": {**SFT, "completion_only_loss": False},
    }.items():
        layout = "prompt_completion" if name == "completions" else "messages"
        jsonl(tmp_path / "held.jsonl", ROWS[layout])
        tokenizer = texts.tokenizer()
        tokenizer.chat_template = MARKED
        asked = plan(
            {"held": {"datasets": "held.jsonl", "stage": "two"}},
            {"name": "one", "method": "pt", "datasets": "a.jsonl"},
            stage,
        )
        held = prepare_evals(asked, tokenizer=tokenizer, root=tmp_path)["held"]
        assert isinstance(held.material, Texts)
        counts[name] = sum(each.count for each in held.material.sequences)
    answers = sum(3 + row + 2 for row in range(5))
    assert counts["stage"] >= answers
    assert counts["other"] > counts["stage"]
    # All of a prompt but its first token.
    own = sum(
        each.count for each in prepared(tmp_path, ROWS["prompt_completion"]).material.sequences
    )
    assert counts["completions"] == own + 5 * 3


def test_of_several_sets_the_first_examples_are_taken(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", ROWS["messages"])
    both = [{"path": "held.jsonl"}, {"path": "b.jsonl", "max_samples": 2}]
    held = prepared(tmp_path, ROWS["text"], datasets=both)
    assert len(held.material.sequences) == 9
    few = prepared(tmp_path, ROWS["text"], datasets=both, max_samples=8)
    assert len(few.material.sequences) == 8
    assert few.hash != held.hash


def test_examples_whose_answers_are_cut_away_are_told(tmp_path: Path) -> None:
    rows = [{"prompt": texts.sentence(0, 12), "completion": " w1"}, *ROWS["prompt_completion"]]
    found = score(prepared(tmp_path, rows, max_length=10), models.tiny_llama())
    assert (found.examples, found.details["left_out"]) == (5, 1)
    with pytest.raises(PlanError, match="a larger max_length"):
        prepared(tmp_path, rows[:1], max_length=10)


def test_a_reward_model_has_no_loss(tmp_path: Path) -> None:
    held = prepared(tmp_path, ROWS["text"])
    from lamina.training.evaluate.measuring import measure

    assert measure(held, models.tiny_llama(), texts.tokenizer(), head="reward") is None


def test_preferences_are_no_texts(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"preference.*(?s:.)*completion: chosen"):
        prepared(tmp_path, texts.preferences().to_list())
