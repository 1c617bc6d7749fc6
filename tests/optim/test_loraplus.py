from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from tests import models
from tests.optim.training import fill, moved, perceptron, run, weights

BASE = "base_model.model."


def groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[set[str]]:
    """The names in each group, without what comes before the model's own."""
    names = {id(p): name.removeprefix(BASE) for name, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]


def plus(model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 16}
    return lamina.create_loraplus_optimizer(model, torch.optim.AdamW, **settings | changes)


def test_groups_rates_and_decay() -> None:
    config = lamina.LoraConfig(target_modules=["embed", "head"], r=2)
    model = lamina.get_peft_model(models.embedding_net(), config)
    optimizer = plus(model, loraplus_weight_decay=0.1, loraplus_lr_embedding=5e-4, betas=(0.8, 0.9))
    assert groups(model, optimizer) == [
        {"head.lora_A.default.weight"},
        {"embed.lora_embedding_A.default", "embed.lora_embedding_B.default"},
        {"head.lora_B.default.weight"},
        set(),
    ]
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 5e-4, 16e-3, 16e-3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
    assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.9)}


class Misleading(nn.Module):
    """Modules whose names hold what places of factors, and biases, are called."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_B_debias = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.lora_B_debias(x))


def test_only_whole_names_count() -> None:
    # peft asks for "lora_B" and "bias" anywhere in the name: here it would train A at B's rate
    # and never decay B.
    config = lamina.LoraConfig(
        target_modules=["lora_B_debias"], modules_to_save=["norm"], r=2, bias="lora_only"
    )
    model = lamina.get_peft_model(Misleading(), config)
    layer, norm = "lora_B_debias", "norm.modules_to_save.default"
    assert groups(model, plus(model)) == [
        {f"{layer}.lora_A.default.weight"},
        set(),
        {f"{layer}.lora_B.default.weight"},
        {f"{layer}.base_layer.bias", f"{norm}.weight", f"{norm}.bias"},
    ]


def test_b_learns_faster_by_the_ratio() -> None:
    # The first step of Adam is the rate times the gradient's sign.
    model = perceptron(lora_dropout=0.0)
    before = weights(model)
    run(model, plus(model, lr=1e-3, loraplus_lr_ratio=8, eps=0.0), steps=1)
    for name, parameter in model.named_parameters():
        size = 8e-3 if ".lora_B." in name else 1e-3 if ".lora_A." in name else 0.0
        change = (parameter.detach() - before[name]).abs()
        torch.testing.assert_close(change, torch.full_like(change, size), rtol=1e-3, atol=0)


def test_it_takes_a_plain_model_too() -> None:
    model = models.perceptron()
    sizes = [len(group["params"]) for group in plus(model).param_groups]
    assert sizes == [2, 0, 0, 1]


def test_a_frozen_adapter_is_in_no_group() -> None:
    model = perceptron()
    model.add_adapter("frozen", lamina.LoraConfig(target_modules=["up"]))
    assert not any("frozen" in name for names in groups(model, plus(model)) for name in names)


def test_state_goes_on_after_a_restore() -> None:
    model, other = perceptron(), perceptron()
    optimizer, again = plus(model), plus(other)
    run(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, 2, first=3)
    run(other, again, 2, first=3)
    assert moved(weights(model), other) == set()


def test_a_scheduler_keeps_the_ratio() -> None:
    model = perceptron()
    optimizer = plus(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=2)
    for _ in range(2):
        run(model, optimizer, 1)
        schedule.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-4, 1e-7, 16e-4, 16e-4])


def test_all_faults_in_one_error() -> None:
    model = perceptron()
    model.requires_grad_(False)
    with pytest.raises(lamina.OptimizerError) as caught:
        lamina.create_loraplus_optimizer(
            model,
            dict,  # type: ignore[arg-type]
            lr=-1.0,
            loraplus_lr_ratio=0,
            loraplus_weight_decay=float("nan"),
            loraplus_lr_embedding="1e-6",
        )
    assert len(caught.value.faults) == 6
    assert "subclass of torch.optim.Optimizer" in str(caught.value)


def test_a_decay_that_every_group_overrides_is_told_of() -> None:
    with pytest.warns(UserWarning, match="loraplus_weight_decay"):
        optimizer = plus(perceptron(), weight_decay=0.1)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_embeddings_stay_in_32_bits_under_an_8_bit_optimizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    overrides = bitsandbytes.optim.GlobalOptimManager.get_instance()
    monkeypatch.setattr(overrides, "module_weight_config_triple", [])
    config = lamina.LoraConfig(target_modules=["head"], r=2, modules_to_save=["embed"])
    model = lamina.get_peft_model(models.embedding_net(), config)
    fill(model)
    lamina.create_loraplus_optimizer(
        model, bitsandbytes.optim.AdamW8bit, lr=1e-3, loraplus_lr_ratio=2
    )
    found = overrides.module_weight_config_triple
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    assert [module for module, _, _ in found] == embeddings
    assert {(name, config["optim_bits"]) for _, name, config in found} == {("weight", 32)}
