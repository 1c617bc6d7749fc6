"""One script, run with either library in the place of `peft`, gives the same numbers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch

import lamina.config
import lamina.model
from lamina.model import get_peft_model
from tests import models
from tests.adapters import fill

LAMINA = SimpleNamespace(**vars(lamina.model), LoraConfig=lamina.config.LoraConfig)


def script(library: Any, base: Any, start: Path, work: Path) -> dict[str, Any]:
    """Stage 1 trained on, saved; stage 2 beside it; all with names that both libraries have."""
    torch.manual_seed(0)
    model = library.PeftModel.from_pretrained(base, start, is_trainable=True)
    seen: dict[str, Any] = {"counts": model.get_nb_trainable_parameters()}
    seen["first"] = train(model)
    model.save_pretrained(work / "one")
    model.add_adapter("two", library.LoraConfig(r=2, target_modules=["up_proj"], lora_alpha=6))
    # Both begin the second adapter with the same random numbers.
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".lora_A.two." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.set_adapter("two")
    seen["active"] = model.active_adapters
    seen["second"] = train(model)
    model.set_adapter("default")
    with model.disable_adapter():
        seen["disabled"] = logits(model)
    seen["enabled"] = logits(model)
    model.merge_adapter()
    seen["merged"] = logits(model)
    model.unmerge_adapter()
    model.delete_adapter("two")
    state = library.get_peft_model_state_dict(model)
    seen["names"] = sorted(state)
    again = library.PeftModel.from_pretrained(models.tiny_llama(), work / "one")
    seen["again"] = logits(again)
    library.set_peft_model_state_dict(again, {key: value * 0.5 for key, value in state.items()})
    seen["halved"] = logits(again)
    seen["generated"] = again.generate(input_ids=models.token_ids(1, 4), max_new_tokens=5)
    seen["unloaded"] = logits(again.merge_and_unload())
    return seen


def train(model: Any, steps: int = 5) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(steps):
        ids = models.token_ids(seed=step % 2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=models.token_ids(seed=8)).logits


@pytest.fixture
def start(tmp_path: Path) -> Path:
    config = lamina.config.LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_alpha=8
    )
    model = get_peft_model(models.tiny_llama(), config)
    fill(model, seed=6, size=0.05)
    model.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def test_the_same_script_gives_the_same_numbers(start: Path, tmp_path: Path) -> None:
    libraries: dict[str, SimpleNamespace | ModuleType] = {"lamina": LAMINA, "peft": peft}
    ours, theirs = (
        script(library, models.tiny_llama(), start, tmp_path / name)
        for name, library in libraries.items()
    )
    assert ours.keys() == theirs.keys()
    assert ours["first"][-1] < ours["first"][0]
    assert ours["second"][-1] < ours["second"][0]
    assert not torch.allclose(ours["disabled"], ours["enabled"], atol=1e-3)
    for name, value in ours.items():
        if name in ("names", "active"):
            assert value == theirs[name]
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_fresh_adapter_trains_to_the_same_losses(task: str) -> None:
    make = models.tiny_llama if task == "CAUSAL_LM" else models.tiny_bert_classifier
    losses, start = [], None
    for library in (LAMINA, peft):
        torch.manual_seed(0)
        config = library.LoraConfig(
            task_type=task, target_modules="all-linear", r=4, lora_alpha=16, bias="all"
        )
        model = library.get_peft_model(make(), config)
        state = library.get_peft_model_state_dict(model)
        if start is None:
            start = {key: value.clone() for key, value in state.items()}
        else:
            library.set_peft_model_state_dict(model, start)
        model.eval()
        losses.append(supervised(model, task))
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def supervised(model: Any, task: str) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = models.token_ids(batch=6)
    labels = ids if task == "CAUSAL_LM" else torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
