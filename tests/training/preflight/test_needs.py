"""What a run needs, against sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lamina.config import LoraConfig
from lamina.training.plan import Plan
from lamina.training.preflight import needs
from lamina.training.preflight.base import Base
from lamina.training.preflight.targets import Adapter
from tests import models


def plan(**settings: object) -> Plan:
    top = {name: settings.pop(name) for name in ("load_in_4bit", "dtype") if name in settings}
    first = {"name": "a", "method": "pt", "datasets": "a.txt", "max_length": 10}
    second = {**first, "name": "b", "mode": "stack", **settings}
    return Plan.model_validate(
        {"model_name_or_path": "x", "output_dir": "o", "stages": [first, second], **top}
    )


@pytest.fixture
def base() -> Base:
    model = models.tiny_llama()
    linear = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    every = sum(p.numel() for p in model.parameters())
    return Base(model, model.config, linear, every, None, None)


ADAPTERS = [Adapter(0, LoraConfig(), None, 100), Adapter(1, LoraConfig(), None, 30)]


def test_memory_of_adapters_optimizer_base_and_activations(base: Base) -> None:
    need = needs.memory_need(plan(per_device_train_batch_size=2), base, ADAPTERS)
    # The first stage needs most: 4 examples of 10 tokens.
    config = base.config
    assert need.parts["base"] == 4 * base.parameters
    assert need.parts["adapters"] == 100 * (4 + 4 + 8)
    assert need.parts["activations"] == (
        40 * config.hidden_size * 17 * config.num_hidden_layers * 4
    )
    assert need.parts["logits"] == 40 * config.vocab_size * (4 + 8)
    assert need.bytes == sum(need.parts.values())
    assert need.total is None or need.free is None or need.free <= need.total


def test_older_stages_and_what_is_folded_take_memory_too(base: Base) -> None:
    asked = plan(mode="merge", per_device_train_batch_size=64, optim="sgd", dtype="bfloat16")
    parts = needs.memory_need(asked, base, ADAPTERS).parts
    assert parts["adapters"] == 100 * 4 + 30 * (4 + 4)
    assert parts["base"] == 2 * base.parameters
    assert parts["merge"] == 2 * base.linear


def test_four_bits_are_a_little_more_than_half_a_byte(base: Base) -> None:
    found = needs.base_bytes(plan(load_in_4bit=True), base)
    assert found == int(base.linear * (0.5 + 2 / 64)) + 4 * (base.parameters - base.linear)
    assert needs.dtype_of(plan(), base) == torch.float32


def test_pairs_and_checkpointing(base: Base) -> None:
    layers, hidden = base.config.num_hidden_layers, base.config.hidden_size
    asked = plan(method="dpo", per_device_train_batch_size=50, gradient_checkpointing=True)
    parts = needs.memory_need(asked, base, ADAPTERS).parts
    assert parts["activations"] == 50 * 10 * 2 * hidden * (layers + 17) * 4


def test_disk_of_all_stages_and_of_the_largest_checkpoints(base: Base, tmp_path: Path) -> None:
    need = needs.disk_need(plan(), ADAPTERS)
    # The second stage's file holds the first's ranks too; two checkpoints with Adam's state.
    assert need.parts == {"adapters": 4 * (100 + 130), "checkpoints": 2 * 100 * (4 + 8)}


@pytest.mark.parametrize(
    ("optimizer", "size"),
    [("adamw_torch", 8), ("adamw_bnb_8bit", 2), ("sgd", 0), ("lion_8bit", 1), ("adafactor", 1)],
)
def test_state_of_optimizers(optimizer: str, size: int) -> None:
    assert needs.state_bytes(optimizer) == size
