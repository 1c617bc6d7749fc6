"""Several steps with each optimizer, by Lamina and by the real peft, to the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft.optimizers
import pytest
import torch
from peft.optimizers import lorafa as lorafa_of_peft
from torch import Tensor, nn

import lamina
from lamina.optim import lorafa
from tests import models
from tests.optim.training import inputs, run, weights
from tests.parity.pairs import pair, trained

# What peft warns of is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

Case = tuple[Callable[[], nn.Module], dict[str, Any], Tensor]
CASES: dict[str, Case] = {
    "linear": (models.perceptron, {"target_modules": ["up", "down"]}, inputs()),
    "rslora": (
        models.perceptron,
        {"target_modules": ["up", "down"], "use_rslora": True, "rank_pattern": {"up": 2}},
        inputs(),
    ),
    "biases": (models.perceptron, {"target_modules": ["up"], "bias": "all"}, inputs()),
    "whole": (
        models.perceptron,
        {"target_modules": ["up"], "modules_to_save": ["down"]},
        inputs(),
    ),
    "embedding": (models.embedding_net, {"target_modules": ["embed", "head"]}, models.token_ids()),
    "llama": (models.tiny_llama, {"target_modules": ["q_proj", "up_proj"]}, models.token_ids()),
    "Conv1D": (models.tiny_gpt2, {"target_modules": ["c_attn"]}, models.token_ids()),
}

MAKERS: dict[str, Callable[[Any, nn.Module], torch.optim.Optimizer]] = {
    "loraplus": lambda made_by, model: made_by.create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=1e-2,
        loraplus_lr_ratio=4.0,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=3e-3,
    ),
    "lorafa": lambda made_by, model: made_by.create_lorafa_optimizer(
        model, r=4, lora_alpha=6, lr=1e-2, weight_decay=0.1
    ),
    "riemannian": lambda made_by, model: made_by.create_riemannian_optimizer(
        model, torch.optim.AdamW, lr=1e-2, reg=0.02, weight_decay=0.1
    ),
    "riemannian SGD": lambda made_by, model: made_by.create_riemannian_optimizer(
        model, torch.optim.SGD, lr=1e-2, momentum=0.9
    ),
}


def twins(case: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    make, config, _ = CASES[case]
    ours, theirs = pair(make, **{"r": 4, "lora_alpha": 6} | config)
    return ours.to(dtype), theirs.to(dtype)


def groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups with names in the place of parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        {**group, "params": sorted(names[id(p)] for p in group["params"])}
        for group in optimizer.param_groups
    ]


def assert_same_weights(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    mine, other = weights(ours), weights(theirs)
    assert mine.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("maker", MAKERS)
def test_the_same_weights_after_several_steps(maker: str, case: str) -> None:
    ours, theirs = twins(case)
    before = weights(ours)
    make, x = MAKERS[maker], CASES[case][2]
    mine, other = make(lamina, ours), make(peft.optimizers, theirs)
    run(ours, mine, 5, x)
    run(theirs, other, 5, x)
    assert_same_weights(ours, theirs, 2e-6)
    changed = {n for n, p in ours.named_parameters() if not torch.equal(p, before[n])}
    assert changed >= {name for name in trained(theirs) if "lora_B" in name}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("maker", MAKERS)
def test_the_same_groups(maker: str, case: str) -> None:
    ours, theirs = twins(case)
    make = MAKERS[maker]
    mine, other = make(lamina, ours), make(peft.optimizers, theirs)
    assert groups(ours, mine) == groups(theirs, other)


@pytest.mark.parametrize("maker", ["lorafa", "riemannian"])
def test_bf16_factors(maker: str) -> None:
    # One rounding of bf16 is 1/256 of a weight; LoRA-FA sums A A' in fp32, peft in bf16.
    ours, theirs = twins("linear", torch.bfloat16)
    make, x = MAKERS[maker], inputs().bfloat16()
    run(ours, make(lamina, ours), 3, x)
    run(theirs, make(peft.optimizers, theirs), 3, x)
    assert_same_weights(ours, theirs, 2e-2 if maker == "lorafa" else 0.0)


def test_lorafa_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lorafa, lorafa_of_peft):
        monkeypatch.setattr(module, "is_bf16_available", lambda: False)
    ours, theirs = twins("rslora")
    run(ours, MAKERS["lorafa"](lamina, ours), 5)
    run(theirs, MAKERS["lorafa"](peft.optimizers, theirs), 5)
    assert_same_weights(ours, theirs, 2e-6)


@pytest.mark.parametrize("case", ["linear", "biases", "embedding"])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_state_saved_by_peft_is_gone_on_from(maker: str, case: str) -> None:
    ours, theirs = twins(case)
    make, x = MAKERS[maker], CASES[case][2]
    other, mine = make(peft.optimizers, theirs), make(lamina, ours)
    run(theirs, other, 2, x)
    ours.load_state_dict(theirs.state_dict())
    # torch would share the tensors.
    mine.load_state_dict(copy.deepcopy(other.state_dict()))
    run(ours, mine, 1, x, first=2)
    run(theirs, other, 1, x, first=2)
    assert_same_weights(ours, theirs, 2e-6)
    if maker == "lorafa":
        assert mine.state.keys() == other.state.keys()
