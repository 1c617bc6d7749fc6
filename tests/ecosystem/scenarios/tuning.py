"""TRL's trainers that tune on texts, on rewards, and towards a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from trl import (
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import lamina
from tests import models
from tests.ecosystem import texts
from tests.ecosystem.kept import BASES, answer, keep, reward_model

# TRL's settings set what newer releases of transformers call activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 1,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def config(kind: Any = None, **changes: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    return (kind or peft.LoraConfig)(**settings)


def losses(of: Any) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


def arguments(kind: Any, folder: Path, **changes: Any) -> Any:
    return kind(output_dir=str(folder), **{**SETTINGS, **changes})


def check(trainer: Any, folder: Path, base: str) -> None:
    """The checkpoint is an adapter that answers as the model does, the loss is a number."""
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    checkpoint = folder / "checkpoint-4"
    again = peft.PeftModel.from_pretrained(BASES[base](), checkpoint)
    torch.testing.assert_close(answer(again), answer(trainer.model))
    assert not torch.allclose(answer(again), answer(BASES[base]()), atol=1e-4)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    keep(checkpoint, base, answer(trainer.model))


def adapted(how: str, base: Any, **changes: Any) -> tuple[Any, Any]:
    """A model and the config to hand to a trainer: one of the two has the adapter."""
    if how == "config":
        return base, config(**changes)
    if how == "peft":
        return peft.get_peft_model(base, config(**changes)), None
    return lamina.get_peft_model(base, config(lamina.LoraConfig, **changes)), None


ways = pytest.mark.parametrize("how", ["config", "peft", "native"])


@ways
def test_sft(how: str, tmp_path: Path) -> None:
    model, peft_config = adapted(how, models.tiny_llama())
    trainer = SFTTrainer(
        model=model,
        args=arguments(SFTConfig, tmp_path, max_length=32),
        train_dataset=texts.texts(),
        processing_class=texts.tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.01
    check(trainer, tmp_path, "llama")


@pytest.mark.ecosystem
@pytest.mark.parametrize(
    "changes",
    [{"packing": True, "packing_strategy": "wrapped"}, {"gradient_checkpointing": True}],
)
def test_sft_otherwise(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=models.tiny_llama(),
        args=arguments(SFTConfig, tmp_path, max_length=32, **changes),
        train_dataset=texts.texts(),
        processing_class=texts.tokenizer(),
        peft_config=config(),
    )
    trainer.train()
    check(trainer, tmp_path, "llama")


@pytest.mark.ecosystem
def test_sft_over_a_stage_in_each_mode(tmp_path: Path) -> None:
    parent = None
    for mode in (None, "stack", "continue", "merge"):
        name = f"stage-{mode}"
        own = None if mode == "continue" else config(lamina.LoraConfig)
        where = {} if parent is None else {"parent": parent, "mode": mode}
        model = lamina.begin_stage(models.tiny_llama(), name=name, config=own, **where)
        trainer = SFTTrainer(
            model=model,
            args=arguments(SFTConfig, tmp_path / name, max_length=32),
            train_dataset=texts.texts(),
            processing_class=texts.tokenizer(),
        )
        trainer.train()
        assert losses(trainer)[-1] < losses(trainer)[0]
        check(trainer, tmp_path / name, "llama")
        parent = tmp_path / name / "checkpoint-4"
    assert [stage.mode for stage in lamina.lineage(parent).stages] == [
        "fresh",
        "stack",
        "continue",
        "merge",
    ]


def rewarded(completions: list[str], **columns: Any) -> list[float]:
    """More for later words."""
    return [sum(hash(word) % 7 for word in text.split()) / 10 for text in completions]


@pytest.mark.ecosystem
@ways
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(how: str, beta: float, tmp_path: Path) -> None:
    model, peft_config = adapted(how, models.tiny_llama())
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewarded,
        args=arguments(
            GRPOConfig,
            tmp_path,
            num_generations=4,
            max_completion_length=6,
            beta=beta,
            temperature=1.5,
        ),
        train_dataset=texts.rows(prompt=texts.sentence),
        processing_class=texts.tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    # A reference adapter is there where one is needed, and only then.
    assert ("ref" in trainer.model.peft_config) == (beta > 0 and how != "config")
    check(trainer, tmp_path, "llama")


@ways
def test_reward(how: str, tmp_path: Path) -> None:
    changes = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    model, peft_config = adapted(how, reward_model(), **changes)
    trainer = RewardTrainer(
        model=model,
        args=arguments(RewardConfig, tmp_path, max_length=32),
        train_dataset=texts.preferences(),
        processing_class=texts.tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.01
    check(trainer, tmp_path, "reward")
