"""Stages whose initialisation takes a part out of the base lie over the base as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.checkpoint.adapter import read_adapter
from lamina.checkpoint.record import read_record
from lamina.engine.names import adapted_layers
from tests import models

IDS = models.token_ids()
CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


def begin(init: str, **changes: Any) -> lamina.PeftModel:
    config = lamina.LoraConfig(**{**CONFIG, "init_lora_weights": init, **changes})
    return lamina.begin_stage(models.tiny_llama(), name="first", config=config)


@torch.no_grad()
def train(model: torch.nn.Module, seed: int) -> None:
    """Move all that trains by a little."""
    with models.seeded(seed):
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))


@torch.no_grad()
def answer(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


def record(path: Path) -> Any:
    return read_record(read_adapter(path).metadata)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 3}}])
def test_a_saved_stage_is_right_on_the_original_base(
    init: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = begin(init, **changes)
    train(model, 1)
    expected = answer(model)
    lamina.save_stage(model, tmp_path)

    loaded = lamina.load(tmp_path, models.tiny_llama())
    torch.testing.assert_close(answer(loaded), expected, atol=2e-5, rtol=0)
    assert loaded.peft_config["first"].init_lora_weights is True
    (only,) = record(tmp_path).laminae
    assert only.began == init
    assert all(only.ranks[module] == 2 * r for module, r in only.taken.items())


def test_continue_takes_the_same_part_out_again_and_trains_what_trained(tmp_path: Path) -> None:
    model = begin("pissa")
    train(model, 1)
    before = dict(adapted_layers(model.get_base_model()))
    lamina.save_stage(model, tmp_path / "first")

    again = lamina.begin_stage(
        models.tiny_llama(), name="second", parent=tmp_path / "first", mode="continue"
    )
    torch.testing.assert_close(answer(again), answer(model), atol=2e-5, rtol=0)
    for module, layer in adapted_layers(again.get_base_model()):
        for mine, other in zip(
            layer.factors("second"), before[module].factors("first"), strict=True
        ):
            torch.testing.assert_close(mine, other)
            assert mine.requires_grad
        torch.testing.assert_close(layer.base_layer.weight, before[module].base_layer.weight)

    train(again, 2)
    lamina.save_stage(again, tmp_path / "second")
    loaded = lamina.load(tmp_path / "second", models.tiny_llama())
    torch.testing.assert_close(answer(loaded), answer(again), atol=2e-5, rtol=0)
    (only,) = record(tmp_path / "second").laminae
    assert (only.began, only.stage) == ("pissa", "second")
    assert set(only.ranks.values()) == {8}


@pytest.mark.parametrize("mode", ["stack", "merge"])
@pytest.mark.parametrize("inits", [("pissa", True), (True, "olora"), ("olora", "pissa")])
def test_stages_on_each_other_are_right_on_the_original_base(
    mode: str, inits: tuple[Any, Any], tmp_path: Path
) -> None:
    model = begin(inits[0])
    train(model, 1)
    lamina.save_stage(model, tmp_path / "first")
    config = lamina.LoraConfig(**{**CONFIG, "r": 2, "init_lora_weights": inits[1]})
    above = lamina.begin_stage(
        models.tiny_llama(), name="second", parent=tmp_path / "first", mode=mode, config=config
    )
    torch.testing.assert_close(answer(above), answer(model), atol=2e-5, rtol=0)
    train(above, 2)
    expected = answer(above)
    lamina.save_stage(above, tmp_path / "second")
    loaded = lamina.load(tmp_path / "second", models.tiny_llama())
    torch.testing.assert_close(answer(loaded), expected, atol=5e-5, rtol=0)
    with above.disable_adapter():
        torch.testing.assert_close(answer(above), answer(models.tiny_llama()), atol=2e-5, rtol=0)


def test_a_copy_of_the_model_saves_the_same(tmp_path: Path) -> None:
    model = begin("pissa")
    train(model, 1)
    twin = copy.deepcopy(model)
    lamina.save_stage(twin, tmp_path)
    loaded = lamina.load(tmp_path, models.tiny_llama())
    torch.testing.assert_close(answer(loaded), answer(model), atol=2e-5, rtol=0)


def test_a_stage_that_begins_by_loftq_is_refused_at_once() -> None:
    pytest.importorskip("bitsandbytes")
    base = models.tiny_llama()
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    config = lamina.LoraConfig(**CONFIG, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    with pytest.raises(lamina.errors.StageError, match="LoftQ"):
        lamina.begin_stage(base, name="first", config=config)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, weights[name])
