"""What is shown as trained on is what TRL's trainers make of the same data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl

from lamina.training.data import prepare
from lamina.training.data.tokens import Sequences, Tokens, tokenize
from lamina.training.plan.settings import Settings
from tests import models
from tests.ecosystem import texts
from tests.training.data.test_prepare import MARKED
from tests.training.data.written import jsonl, said

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

MAX_LENGTH = 7
TALK = [said("user", "w1 w2"), said("assistant", "w3 w4"), said("user", "w5 w6 w7 w8")]
TALK = [*TALK, said("assistant", "w9")]
PLAIN = [
    {"prompt": "w1 w2", "chosen": " w3 w4 w5 w6 w7 w8", "rejected": " w9"},
    {"prompt": "w1 w2 w3 w4 w5 w6 w7 w8", "chosen": " w3", "rejected": " w9 w1"},
    {"prompt": "w1", "chosen": " w3", "rejected": " w9 w1"},
]
PAIRS = [
    *(
        {key: [said("user" if key == "prompt" else "assistant", value)] for key, value in r.items()}
        for r in PLAIN
    )
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "pt": [{"text": "w1 w2"}, {"text": "w1 w2 w3 w4 w5 w6 w7 w8 w9"}],
    "sft": [{"messages": TALK}, {"messages": TALK[:2]}],
    "completions": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PLAIN],
    "pairs": PAIRS,
    "plain": PLAIN,
    "judged": [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": bool(i % 2)}
        for i, row in enumerate(PAIRS)
    ],
}
TRAINERS: dict[str, tuple[Any, Any]] = {
    "pt": (trl.SFTTrainer, trl.SFTConfig),
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
}


def trainers_own(
    method: str, dataset: Any, tokenizer: Any, folder: Path, **asked: Any
) -> list[Sequences]:
    """What the collator of TRL's trainer gives to a model, an example at a time."""
    trainer_class, config = TRAINERS[method]
    with warnings.catch_warnings():
        # To cut beginnings is deprecated, but done.
        warnings.simplefilter("ignore")
        args = config(
            output_dir=str(folder),
            max_length=MAX_LENGTH,
            use_cpu=True,
            report_to=[],
            per_device_train_batch_size=2,
            activation_checkpointing=False,
            bf16=False,
            **asked,
        )
    model = models.tiny_llama()
    if method == "reward":
        from transformers import LlamaForSequenceClassification

        model.config.num_labels = 1
        model = LlamaForSequenceClassification(model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = {"ref_model": models.tiny_llama()} if method in {"dpo", "kto"} else {}
        trainer = trainer_class(
            model=model, args=args, train_dataset=dataset, processing_class=tokenizer, **more
        )
    return [sequences(method, trainer.data_collator([row])) for row in trainer.train_dataset]


def sequences(method: str, batch: Any) -> Sequences:
    if method in {"pt", "sft"}:
        return {"": tokens(batch["input_ids"], batch["labels"] != -100, batch["attention_mask"])}
    if method == "orpo":
        return {
            name: tokens(
                batch[f"{name}_input_ids"],
                batch[f"{name}_labels"] != -100,
                batch[f"{name}_attention_mask"],
            )
            for name in ("chosen", "rejected")
        }
    if method == "kto":
        names = ["wanted" if batch["label"].item() else "unwanted"]
    else:
        names = ["chosen", "rejected"]
    mask = batch.get("completion_mask", batch["attention_mask"])
    return {
        name: tokens(batch["input_ids"][[i]], mask[[i]], batch["attention_mask"][[i]])
        for i, name in enumerate(names)
    }


def tokens(ids: torch.Tensor, trained: torch.Tensor, real: torch.Tensor) -> Tokens:
    kept = real[0].bool()
    return Tokens(tuple(ids[0][kept].tolist()), tuple(trained[0][kept].bool().tolist()))


@pytest.mark.parametrize(
    ("method", "rows", "asked"),
    [
        ("pt", "pt", {}),
        ("sft", "sft", {}),
        ("sft", "sft", {"assistant_only_loss": True}),
        ("sft", "completions", {}),
        ("sft", "completions", {"completion_only_loss": False}),
        ("sft", "completions", {"truncation_mode": "keep_end"}),
        ("dpo", "pairs", {}),
        ("dpo", "plain", {"truncation_mode": "keep_end"}),
        ("kto", "judged", {}),
        ("kto", "pairs", {}),
        ("orpo", "pairs", {}),
        ("orpo", "plain", {}),
        ("reward", "pairs", {}),
    ],
)
def test_tokens_and_masks_are_those_of_the_trainer(
    tmp_path: Path, method: str, rows: str, asked: dict[str, Any]
) -> None:
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = MARKED
    own = {key: value for key, value in asked.items() if key in Settings.model_fields}
    settings = Settings(
        method=method,  # type: ignore[arg-type]
        datasets=[str(jsonl(tmp_path / "a.jsonl", ROWS[rows]))],  # type: ignore[list-item]
        max_length=MAX_LENGTH,
        trainer_args={key: value for key, value in asked.items() if key not in own},
        **own,
    )
    data = prepare(settings, tokenizer=tokenizer, seed=0)
    shown = tokenize(data.train, settings, tokenizer, max_length=MAX_LENGTH)
    expected = trainers_own(method, data.train, tokenizer, tmp_path, **asked)
    assert shown == expected
    assert shown
    whole = tokenize(data.train, settings, tokenizer, max_length=None)
    assert len(whole) == len(data.train)
    assert max(len(part) for each in whole for part in each.values()) > MAX_LENGTH


def test_prompts_of_grpo_end_where_the_answer_begins(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = texts.TURN + "{% if add_generation_prompt %}w9{% endif %}"
    rows = [{"prompt": [said("user", "w1 w2")]}]
    path = str(jsonl(tmp_path / "a.jsonl", rows))
    settings = Settings(method="grpo", datasets=[path])  # type: ignore[list-item]
    data = prepare(settings, tokenizer=tokenizer, seed=0)
    (shown,) = tokenize(data.train, settings, tokenizer, max_length=None)
    expected = tokenizer("w1 w2 w9")["input_ids"]
    assert shown == {"": Tokens(tuple(expected), (False,) * 3)}


def test_conversations_for_orpo_are_rendered_as_its_trainer_would(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer()
    path = str(jsonl(tmp_path / "a.jsonl", PAIRS))
    settings = Settings(method="orpo", datasets=[path], eval_datasets=[path])  # type: ignore[list-item]
    data = prepare(settings, tokenizer=tokenizer, seed=0)
    expected = [trl.maybe_apply_chat_template(row, tokenizer) for row in PAIRS]
    assert data.train.to_list() == data.evaluation.to_list() == expected
    assert isinstance(expected[0]["prompt"], str)


def test_streaming_conversations_become_the_same_tokens_in_the_trainer(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = MARKED
    path = str(jsonl(tmp_path / "a.jsonl", ROWS["sft"]))
    shown = []
    for streaming in (True, False):
        settings = Settings(
            method="sft",
            datasets=[{"path": path, "streaming": streaming}],  # type: ignore[list-item]
            assistant_only_loss=True,
        )
        data = prepare(settings, tokenizer=tokenizer, seed=0)
        asked = {"assistant_only_loss": True, "max_steps": 1}
        shown.append(trainers_own("sft", data.train, tokenizer, tmp_path, **asked))
    assert sorted(shown[0], key=str) == sorted(shown[1], key=str)
    assert len(shown[0]) == 2
