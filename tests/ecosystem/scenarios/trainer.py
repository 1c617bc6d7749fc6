"""transformers' Trainer over peft's facade and over Lamina's own, and accelerate by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments

import lamina
from tests import models
from tests.ecosystem.kept import answer, keep

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
BASES = {"llama": models.tiny_llama, "gpt2": models.tiny_gpt2}
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """Four rows, one batch, so that every step sees the same and the loss falls."""

    def __init__(self) -> None:
        self.ids = models.token_ids(batch=4, length=8)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.ids[index]
        return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}


def through_peft(base: str = "llama", name: str = "default", **changes: Any) -> Any:
    settings = {"r": 4, "target_modules": TARGETS[base], "task_type": "CAUSAL_LM", **changes}
    torch.manual_seed(0)
    return peft.get_peft_model(BASES[base](), peft.LoraConfig(**settings), adapter_name=name)


def natively(base: str = "llama", name: str = "default", **changes: Any) -> Any:
    settings = {"r": 4, "target_modules": TARGETS[base], "task_type": "CAUSAL_LM", **changes}
    torch.manual_seed(0)
    return lamina.get_peft_model(BASES[base](), lamina.LoraConfig(**settings), adapter_name=name)


either = pytest.mark.parametrize("make", [through_peft, natively])


def trainer(model: nn.Module, output: Path, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(**settings | changes)
    return Trainer(model=model, args=arguments, train_dataset=Texts(), eval_dataset=Texts())


def losses(of: Trainer) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.state_dict()
    return {name: each.clone() for name, each in named.items() if ".lora_" in name}


@either
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_checkpoint_is_an_adapter_directory(
    make: Callable[..., Any], base: str, tmp_path: Path
) -> None:
    model = make(base)
    run = trainer(model, tmp_path, **SAVING)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    checkpoint = tmp_path / "checkpoint-4"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files(checkpoint)
    assert not {"model.safetensors", "pytorch_model.bin"} & files(checkpoint)
    again = peft.PeftModel.from_pretrained(BASES[base](), checkpoint)
    torch.testing.assert_close(answer(again), answer(model))
    keep(checkpoint, base, answer(model))


@either
def test_a_run_is_resumed_where_it_stopped(make: Callable[..., Any], tmp_path: Path) -> None:
    whole = make()
    trainer(whole, tmp_path / "run", **SAVING).train()
    resumed = make()
    run = trainer(resumed, tmp_path / "again", max_steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, tensor in tensors(whole).items():
        torch.testing.assert_close(tensors(resumed)[name], tensor, rtol=1e-6, atol=1e-7)


@either
def test_the_best_checkpoint_is_loaded_at_the_end(make: Callable[..., Any], tmp_path: Path) -> None:
    model = make()
    # The rate is so high that the loss only grows: the first checkpoint is the best.
    run = trainer(
        model,
        tmp_path,
        **SAVING,
        learning_rate=30.0,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    run.train()
    best = tmp_path / "checkpoint-2"
    assert run.state.best_model_checkpoint == str(best)
    expected = peft.PeftModel.from_pretrained(models.tiny_llama(), best)
    torch.testing.assert_close(answer(model), answer(expected))
    last = peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "checkpoint-4")
    assert not torch.allclose(answer(model), answer(last))


@either
def test_a_named_adapter_is_resumed(make: Callable[..., Any], tmp_path: Path) -> None:
    whole = make(name="mine")
    trainer(whole, tmp_path / "run", **SAVING).train()
    assert (tmp_path / "run" / "checkpoint-2" / "mine" / "adapter_config.json").is_file()
    resumed = make(name="mine")
    run = trainer(resumed, tmp_path / "again", max_steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, tensor in tensors(whole).items():
        torch.testing.assert_close(tensors(resumed)[name], tensor, rtol=1e-6, atol=1e-7)


@either
def test_all_of_several_adapters_are_resumed(make: Callable[..., Any], tmp_path: Path) -> None:
    def two(seed: int) -> Any:
        model = make(init_lora_weights=False)
        with torch.no_grad():
            for each in model.parameters():
                if each.requires_grad:
                    each.mul_(seed)
        config = type(model.peft_config["default"])
        more = config(r=2, target_modules=["o_proj"], init_lora_weights=False)
        model.add_adapter("other", more)
        return model

    whole = two(1)
    trainer(whole, tmp_path / "run", **SAVING).train()
    resumed = two(2)
    run = trainer(resumed, tmp_path / "again", max_steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert list(resumed.active_adapters) == ["default"]
    assert len(tensors(whole)) == len(tensors(resumed)) == 12
    for name, tensor in tensors(whole).items():
        torch.testing.assert_close(tensors(resumed)[name], tensor, rtol=1e-6, atol=1e-7)


@either
@pytest.mark.parametrize("change", [{"lora_alpha": 32}, {"use_rslora": True}, {"r": 2}])
def test_another_config_than_the_checkpoints_is_refused(
    make: Callable[..., Any], change: dict[str, Any], tmp_path: Path
) -> None:
    trainer(make(), tmp_path / "run", **SAVING).train()
    other = make(**change)
    before = tensors(other)
    run = trainer(other, tmp_path / "again", max_steps=4)
    with pytest.raises(lamina.ConfigError, match=next(iter(change))):
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, tensor in before.items():
        assert torch.equal(tensors(other)[name], tensor)


# Newer releases of transformers call it activation checkpointing; scripts still say gradient.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@either
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_lets_the_gradient_through(
    make: Callable[..., Any], reentrant: bool, tmp_path: Path
) -> None:
    plain, model = make(), make()
    for each, asked in ((plain, {}), (model, {"gradient_checkpointing": True})):
        if asked:
            asked["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        trainer(each, tmp_path, **asked).train()
    for name, tensor in tensors(plain).items():
        assert tensor.any()
        torch.testing.assert_close(tensors(model)[name], tensor)


def test_a_stage_is_trained_resumed_and_saved(tmp_path: Path) -> None:
    config = lamina.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    first = lamina.begin_stage(models.tiny_llama(), name="first", config=config)
    trainer(first, tmp_path / "a", **SAVING).train()
    lamina.save_stage(first, tmp_path / "first")
    expected = answer(first)
    torch.testing.assert_close(
        answer(lamina.load(tmp_path / "first", models.tiny_llama())), expected
    )
    keep(tmp_path / "first", "llama", expected)

    def second() -> Any:
        torch.manual_seed(0)
        more = lamina.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
        parent = {"parent": tmp_path / "first", "mode": "stack"}
        return lamina.begin_stage(models.tiny_llama(), name="second", config=more, **parent)

    whole = second()
    frozen = {name: each for name, each in tensors(whole).items() if ".first." in name}
    trainer(whole, tmp_path / "b", **SAVING).train()
    checkpoint = tmp_path / "b" / "checkpoint-2"
    assert [stage.name for stage in lamina.lineage(checkpoint).stages] == ["first", "second"]
    assert not {"first", "second"} & files(checkpoint)
    resumed = second()
    run = trainer(resumed, tmp_path / "c", max_steps=4)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert list(resumed.active_adapters) == list(whole.active_adapters)
    torch.testing.assert_close(answer(resumed), answer(whole))
    for name, tensor in frozen.items():
        assert torch.equal(tensors(resumed)[name], tensor)
    lamina.save_stage(resumed, tmp_path / "second")
    keep(tmp_path / "second", "llama", answer(whole))


@either
def test_accelerate_prepares_unwraps_and_saves(make: Callable[..., Any], tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = make()
    wanted = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-2)
    loader = torch.utils.data.DataLoader(Texts(), batch_size=8)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found = []
    for _ in range(2):
        for batch in loader:
            loss = prepared(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert found[-1] < found[0]
    unwrapped = accelerator.unwrap_model(prepared)
    assert unwrapped is model
    unwrapped.save_pretrained(
        tmp_path / "adapter",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(prepared),
    )
    keep(tmp_path / "adapter", "llama", answer(model))
    accelerator.save_model(model, str(tmp_path / "whole"))
    assert "model.safetensors" in files(tmp_path / "whole")
    accelerator.save_state(str(tmp_path / "state"))
    before = tensors(model)
    with torch.no_grad():
        for each in wanted:
            each.add_(1)
    accelerator.load_state(str(tmp_path / "state"))
    for name, tensor in before.items():
        assert torch.equal(tensors(model)[name], tensor)


def test_tied_weights_that_are_trained_whole_stay_tied(tmp_path: Path) -> None:
    model = through_peft("gpt2", modules_to_save=["wte"])
    run = trainer(model, tmp_path, **SAVING)
    run.train()
    config = json.loads((tmp_path / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["wte"]
    again = peft.PeftModel.from_pretrained(models.tiny_gpt2(), tmp_path / "checkpoint-4")
    torch.testing.assert_close(answer(again), answer(model))
