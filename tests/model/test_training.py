from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lamina.config import LoraConfig
from lamina.interop import peft as drop_in
from lamina.model import PeftModel, check_gradients, get_peft_model, preflight
from tests import models
from tests.adapters import (
    llama_adapter,
    llama_config,
    logits,
    same,
    trained,
    weights,
)


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """Sixteen fixed rows, with a column that no model knows."""

    def __init__(self) -> None:
        self.ids = models.token_ids(batch=16, length=8)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.ids[index]
        return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}


def train(model: nn.Module, output: Path, *, resume: str | None = None, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(**settings | changes)
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=resume)


def learnt(model: nn.Module) -> bool:
    """Whether every B has left zero."""
    matrices = [p for name, p in model.named_parameters() if ".lora_B." in name]
    assert len(matrices) == 4
    return all(bool(matrix.any()) for matrix in matrices)


def test_trainer_finds_the_columns_of_a_model_without_a_task(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(models.tiny_llama(), config)
    train(model, tmp_path)
    assert learnt(model)


def base_part(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(model).items() if ".lora_" not in name}


def test_the_trainer_trains_a_facade_and_nothing_but_the_adapter(tmp_path: Path) -> None:
    model = get_peft_model(models.tiny_llama(), llama_config())
    base = base_part(model)
    train(model, tmp_path)
    assert learnt(model)
    assert same(base_part(model), base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_a_checkpoint_of_the_trainer_is_resumed(tmp_path: Path) -> None:
    model = get_peft_model(models.tiny_llama(), llama_config())
    train(model, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
    again = get_peft_model(models.tiny_llama(), llama_config())
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    train(again, tmp_path / "again", resume=checkpoint, max_steps=4)
    assert learnt(again)
    for name, tensor in weights(again).items():
        torch.testing.assert_close(tensor, weights(model)[name], rtol=1e-6, atol=1e-7)


@pytest.fixture
def in_place_of_peft() -> Iterator[None]:
    """Trainer knows an adapted model by peft's class; without it, it saves the whole facade."""
    drop_in.install()
    try:
        yield
    finally:
        drop_in.uninstall()


@pytest.mark.usefixtures("in_place_of_peft")
@pytest.mark.parametrize("make", [models.tiny_llama, models.tiny_gpt2])
def test_a_checkpoint_of_the_trainer_is_an_adapter_directory(tmp_path: Path, make: Any) -> None:
    targets = ["q_proj"] if make is models.tiny_llama else ["c_attn"]
    config = LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(make(), config)
    train(model, tmp_path, save_strategy="steps", save_steps=3)
    loaded = PeftModel.from_pretrained(make(), tmp_path / "checkpoint-3")
    assert torch.equal(logits(loaded), logits(model.eval()))


# Newer releases of transformers call it activation checkpointing; scripts still say gradient.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("word", ["gradient", "activation"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_asked_of_the_trainer(tmp_path: Path, reentrant: bool, word: str) -> None:
    model = get_peft_model(models.tiny_llama(), llama_config())
    asked = {
        f"{word}_checkpointing": True,
        f"{word}_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    train(model, tmp_path, **asked)
    assert learnt(model)


def one_step(model: PeftModel) -> dict[str, torch.Tensor]:
    model.train()
    ids = models.token_ids()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    check_gradients(model)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after", "gradient", "activation"])
def test_checkpointing_changes_no_gradient(when: str, reentrant: bool) -> None:
    expected = one_step(llama_adapter())
    kwargs = {"use_reentrant": reentrant}
    base = models.tiny_llama()
    if when == "before":
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        # Older releases of transformers leave this to whoever adapts the model.
        base.disable_input_require_grads()
    model = get_peft_model(base, llama_config())
    model.load_state_dict(llama_adapter().state_dict())
    if when == "after":
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    if when == "gradient":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if when == "activation":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    assert base.is_activation_checkpointing
    found = one_step(model)
    assert found.keys() == expected.keys() == trained(model)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("bf16_autocast", [False, True])
def test_a_bf16_base_trains_fp32_adapters(bf16_autocast: bool) -> None:
    model = get_peft_model(models.tiny_llama().bfloat16(), llama_config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    context = (
        torch.autocast("cpu", dtype=torch.bfloat16) if bf16_autocast else contextlib.nullcontext()
    )
    ids = models.token_ids()
    losses = []
    for _ in range(8):
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_an_adapter_in_the_bases_dtype_when_asked(tmp_path: Path) -> None:
    model = get_peft_model(
        models.tiny_llama().bfloat16(), llama_config(), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    train(model, tmp_path)
    assert learnt(model)


def test_dropout_acts_on_the_branch_and_only_in_training() -> None:
    model = llama_adapter(lora_dropout=0.5)
    base = models.tiny_llama()
    torch.manual_seed(1)
    model.train()
    noisy = logits(model)
    assert not torch.equal(noisy, logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model.eval()), logits(llama_adapter()))


def test_a_second_adapter_trains_over_a_frozen_first(tmp_path: Path) -> None:
    llama_adapter().save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "first")
    model.add_adapter("second", llama_config(r=2))
    model.set_adapter(["default", "second"], train=["second"])
    preflight(model)
    before = weights(model)
    train(model, tmp_path / "run")
    changed = {
        name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])
    }
    assert changed == trained(model)
    assert all(".second." in name for name in changed)
    assert len(changed) == 8
