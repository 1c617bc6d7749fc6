from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lamina
from lamina.config import AdaLoraConfig
from tests import models
from tests.parity.pairs import answer, assert_close, fill, gradients, merged, trained

# What peft warns of is not what is tested.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]

SCHEDULE: dict[str, Any] = {
    "total_step": 7,
    "tinit": 1,
    "tfinal": 2,
    "deltaT": 2,
    "init_r": 4,
    "target_r": 2,
}
IMAGE = torch.linspace(-2, 2, 2 * 3 * 64).reshape(2, 3, 8, 8).sin()
IDS = models.token_ids()
Case = tuple[Callable[[], nn.Module], list[str], Tensor]
CASES: dict[str, Case] = {
    "linear": (models.perceptron, ["up", "down"], torch.linspace(-1, 1, 48).reshape(3, 16)),
    "Conv1D": (models.tiny_gpt2, ["c_attn", "mlp.c_proj"], IDS),
    "conv2d": (lambda: models.convolution_net(2), ["stem", "strided", "pointwise"], IMAGE),
}


def pair(make: Callable[[], nn.Module], **config: Any) -> tuple[Any, Any]:
    """The same model under AdaLoRA with Lamina and with peft, from the same seed."""
    settings = {**SCHEDULE, **config}
    with models.seeded(5):
        ours = lamina.get_peft_model(make(), AdaLoraConfig(**settings))
    with models.seeded(5):
        theirs = peft.get_peft_model(make(), peft.AdaLoraConfig(**settings))
    return ours, theirs


@pytest.mark.parametrize("init", [True, False])
def test_one_seed_gives_one_adapter(init: bool) -> None:
    ours, theirs = pair(models.perceptron, target_modules=["up", "down"], init_lora_weights=init)
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    for name, parameter in other.items():
        assert torch.equal(mine[name], parameter), name
        assert mine[name].requires_grad == parameter.requires_grad, name


@pytest.mark.parametrize("alpha", [6, -1])
@pytest.mark.parametrize("kind", CASES)
def test_answers_and_gradients_are_the_same(kind: str, alpha: float) -> None:
    make, targets, x = CASES[kind]
    ours, theirs = (m.eval() for m in pair(make, target_modules=targets, lora_alpha=alpha))
    fill(ours, theirs, 1)
    assert_close(answer(ours, x), answer(theirs, x), 2e-6)
    assert not torch.allclose(answer(ours, x), answer(make(), x))
    mine, other = gradients(ours, x), gradients(theirs, x)
    assert mine.keys() == other.keys() == trained(theirs).keys()
    for name, gradient in other.items():
        assert gradient.abs().max() > 0, name
        assert_close(mine[name], gradient, 2e-6)


@pytest.mark.parametrize("kind", CASES)
def test_merged_weights_are_the_same(kind: str) -> None:
    make, targets, _ = CASES[kind]
    ours, theirs = pair(make, target_modules=targets)
    fill(ours, theirs, 1)
    mine, other = merged(ours), merged(theirs)
    assert mine.keys() == other.keys()
    for name, weight in other.items():
        assert_close(mine[name], weight)


def steps(model: Any, count: int) -> tuple[list[float], list[dict[str, list[bool]] | None]]:
    """Train; the losses, and after each step which ranks are left."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=3e-2)
    losses, patterns = [], []
    for step in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        patterns.append(copy.deepcopy(model.peft_config["default"].rank_pattern))
    return losses, patterns


def trained_pair() -> tuple[Any, Any]:
    # Without a task_type, peft leaves the penalty out of the loss.
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    ours, theirs = pair(models.tiny_llama, **settings)
    told, expected = steps(ours, 7), steps(theirs, 7)
    assert told[0] == pytest.approx(expected[0], rel=1e-6)
    assert told[1] == expected[1]
    return ours.eval(), theirs.eval()


def test_ranks_are_shared_out_as_peft_shares_them_out() -> None:
    ours, theirs = trained_pair()
    masks = ours.peft_config["default"].rank_pattern
    left = [sum(mask) for mask in masks.values()]
    # target_r=2 on average, and not the same everywhere: else this shows nothing.
    assert sum(left) == 2 * len(left)
    assert len(set(left)) > 1
    for name, parameter in trained(theirs).items():
        assert_close(trained(ours)[name], parameter)


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_files_go_both_ways_with_the_ranks_that_are_left(writer: str, tmp_path: Path) -> None:
    ours, theirs = trained_pair()
    expected = answer(theirs, IDS)
    (ours if writer == "ours" else theirs).save_pretrained(tmp_path)
    for library in (lamina, peft):
        model = library.PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
        assert_close(answer(model, IDS), expected, 1e-5)


def test_files_are_the_same(tmp_path: Path) -> None:
    ours, theirs = trained_pair()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    configs, tensors = [], []
    for each in ("ours", "theirs"):
        values = json.loads((tmp_path / each / "adapter_config.json").read_text())
        configs.append({**values, "target_modules": sorted(values["target_modules"])})
        tensors.append(load_file(tmp_path / each / "adapter_model.safetensors"))
    assert configs[0] == configs[1]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        torch.testing.assert_close(tensors[0][name], tensor)


def test_training_goes_on_from_a_file_as_in_peft(tmp_path: Path) -> None:
    _, theirs = trained_pair()
    theirs.save_pretrained(tmp_path)
    losses = []
    for library in (lamina, peft):
        model = library.PeftModel.from_pretrained(models.tiny_llama(), tmp_path, is_trainable=True)
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        for _ in range(2):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
