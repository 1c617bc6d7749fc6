"""Margins are those of TRL's trainers on the same pairs."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import LlamaForSequenceClassification

from lamina.errors import PlanError
from lamina.training.data import prepare
from lamina.training.evaluate.measuring import measure
from lamina.training.plan.settings import Settings
from tests import models
from tests.ecosystem import texts
from tests.training.data.written import jsonl, said
from tests.training.evaluate.asked import prepared, score

REWARD = {"name": "two", "method": "reward", "datasets": "a.jsonl", "mode": "stack"}
PT = {"name": "one", "method": "pt", "datasets": "a.jsonl"}
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": texts.sentence(row),
        "chosen": " " + texts.sentence(row + 6, 3 + row % 3),
        "rejected": " " + texts.sentence(row + 9, 2 + row % 4, step=3),
    }
    for row in range(9)
]
TALKS = [
    {
        "prompt": [said("user", row["prompt"])],
        "chosen": [said("assistant", row["chosen"].strip())],
        "rejected": [said("assistant", row["rejected"].strip())],
    }
    for row in PAIRS
]


def trainer(
    kind: str, folder: Path, rows: list[dict[str, Any]], model: Any, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """TRL's trainer of a method, and a batch of all rows."""
    path = str(jsonl(folder / "own.jsonl", rows))
    asked = Settings(method=kind.lower(), datasets=[path])  # type: ignore[arg-type,list-item]
    data = prepare(asked, tokenizer=texts.tokenizer(), seed=0)
    reference = {"ref_model": models.tiny_llama()} if kind == "DPO" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(trl, f"{kind}Trainer")(
            model=model,
            args=getattr(trl, f"{kind}Config")(
                output_dir=str(folder / "trl"),
                use_cpu=True,
                report_to=[],
                bf16=False,
                per_device_eval_batch_size=len(rows),
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=data.train,
            eval_dataset=data.train,
            processing_class=texts.tokenizer(),
            **reference,
        )
    return made, made.data_collator(list(made.eval_dataset))


@pytest.mark.parametrize(("rows", "max_length"), [(PAIRS, 64), (TALKS, 64), (PAIRS, 9)])
def test_margins_are_those_of_dpo(
    tmp_path: Path, rows: list[dict[str, Any]], max_length: int
) -> None:
    found = score(
        prepared(tmp_path, rows, metric="accuracy", max_length=max_length),
        models.tiny_llama(),
        batch_size=4,
    )
    made, batch = trainer("DPO", tmp_path, rows, models.tiny_llama(), max_length=max_length)
    with torch.no_grad():
        logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        said_of = logits.logits[:, :-1].log_softmax(-1)
        tokens = said_of.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        chosen, rejected = (tokens * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    evaluated = made.evaluate()
    own = evaluated["eval_logps/chosen"] - evaluated["eval_logps/rejected"]
    assert found.details["margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    assert found.details["margin"] == pytest.approx(own, abs=1e-4)
    share = float((chosen > rejected).float().mean())
    assert found.value == pytest.approx(share)
    assert 0 < share < 1
    assert found.error == pytest.approx(math.sqrt(share * (1 - share) / len(rows)))
    assert found.higher_is_better
    assert found.examples == len(rows)


def scoring(**changes: Any) -> LlamaForSequenceClassification:
    config = models.tiny_llama(**changes).config
    config.num_labels = 1
    with models.seeded(2):
        return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("changes", [{}, {"pad_token_id": None}, {"pad_token_id": 2}])
@pytest.mark.parametrize("rows", [PAIRS, TALKS])
def test_rewards_are_those_of_the_trainer(
    tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any]
) -> None:
    held = prepared(tmp_path, rows, PT, REWARD, metric="accuracy")
    model = scoring(**changes)
    found = score(held, model, head="reward", batch_size=4)
    assert model.config.pad_token_id == models.tiny_llama(**changes).config.pad_token_id
    made, batch = trainer("Reward", tmp_path, rows, scoring(**changes), max_length=64)
    with torch.no_grad():
        chosen, rejected = made.model(**batch).logits[:, 0].chunk(2)
    assert found.value == pytest.approx(made.evaluate()["eval_accuracy"])
    assert found.details["margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-6)
    one = score(held, model, head="reward", batch_size=1)
    assert one.details["margin"] == pytest.approx(found.details["margin"], abs=1e-6)


def test_a_plan_without_reward_models_has_no_pairs_for_them(tmp_path: Path) -> None:
    held = prepared(tmp_path, PAIRS, metric="accuracy")
    assert measure(held, scoring(), texts.tokenizer(), head="reward") is None


def test_ties_count_half(tmp_path: Path) -> None:
    model = models.tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    rows = [{"prompt": "w1", "chosen": " w2 w3", "rejected": " w4 w5"}, {**PAIRS[0]}]
    found = score(prepared(tmp_path, rows, metric="accuracy"), model)
    # Every token is as likely as any: equally long answers tie, the longer one is less likely.
    longer = len(PAIRS[0]["chosen"].split()) - len(PAIRS[0]["rejected"].split())
    assert longer > 0
    assert found.value == 0.25
    expected = -longer * math.log(models.VOCABULARY) / 2
    assert found.details["margin"] == pytest.approx(expected, rel=1e-6)


def test_pairs_that_the_cut_makes_the_same_are_told(tmp_path: Path) -> None:
    same = {"prompt": texts.sentence(0, 8), "chosen": " w1 w2", "rejected": " w1 w3"}
    filled = {**same, "prompt": texts.sentence(0, 20)}
    held = prepared(tmp_path, [same, filled, *PAIRS], metric="accuracy", max_length=9)
    found = score(held, models.tiny_llama())
    assert (found.examples, found.details["left_out"]) == (len(PAIRS), 2)
    with pytest.raises(PlanError, match="a larger max_length"):
        prepared(tmp_path, [same, filled], metric="accuracy", max_length=9)


def test_texts_are_no_preferences(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="accuracy reads what dpo learns from: preference"):
        prepared(tmp_path, [{"text": "w1 w2"}], metric="accuracy")
