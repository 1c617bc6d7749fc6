"""LoftQ over a base that is quantised already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lamina
from lamina.errors import InitialisationError, MissingFileError

bnb = pytest.importorskip("bitsandbytes")
CONFIG: dict[str, Any] = {"r": 8, "lora_alpha": 8, "target_modules": ["0", "2"]}


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def quantised() -> nn.Sequential:
    model = dense()
    for i in (0, 2):
        layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(
            model[i].weight.detach().clone(), requires_grad=False, quant_type="nf4"
        )
        layer.bias = model[i].bias
        model[i] = layer.to("cpu")
    return model


def on_disk(path: Path) -> Path:
    save_file(
        {k: v.contiguous() for k, v in dense().state_dict().items()}, path / "model.safetensors"
    )
    return path


def lost(model: Any, i: int) -> torch.Tensor:
    return dense()[i].weight.detach() - model.base_model.model[i].weight_view.read().float()


def test_the_adapter_is_the_best_of_its_rank_for_what_was_lost(tmp_path: Path) -> None:
    model = lamina.get_peft_model(quantised(), lamina.LoraConfig(**CONFIG))
    lamina.replace_lora_weights_loftq(model, on_disk(tmp_path))
    for i in (0, 2):
        U, S, Vh = torch.linalg.svd(lost(model, i))
        best = (U[:, :8] * S[:8]) @ Vh[:8]
        delta = model.base_model.model[i].delta_weight("default")
        torch.testing.assert_close(delta, best, atol=1e-5, rtol=1e-4)
        assert S[8:].norm() < 0.95 * S.norm()


def test_a_callback_keeps_or_refuses_each_layer(tmp_path: Path) -> None:
    model = lamina.get_peft_model(quantised(), lamina.LoraConfig(**CONFIG))
    asked: list[str] = []

    def keep(given: nn.Module, name: str) -> bool:
        assert given is model
        asked.append(name)
        return name == "2"

    lamina.replace_lora_weights_loftq(model, on_disk(tmp_path), callback=keep)
    assert asked == ["0", "2"]
    kept = [bool(model.base_model.model[i].lora_B["default"].weight.any()) for i in (0, 2)]
    assert kept == [False, True]


def test_what_is_missing_is_told_before_anything_changes(tmp_path: Path) -> None:
    model = lamina.get_peft_model(quantised(), lamina.LoraConfig(**CONFIG))
    save_file({"0.weight": dense()[0].weight.detach()}, tmp_path / "model.safetensors")
    with pytest.raises(InitialisationError, match=r"2: .* has no weight for it"):
        lamina.replace_lora_weights_loftq(model, tmp_path)
    assert not model.base_model.model[0].lora_B["default"].weight.any()
    with pytest.raises(MissingFileError, match="Could not find file"):
        lamina.replace_lora_weights_loftq(model, tmp_path / "elsewhere")
    with pytest.raises(InitialisationError, match="model_path"):
        lamina.replace_lora_weights_loftq(model)


def test_a_dense_model_has_lost_nothing(tmp_path: Path) -> None:
    model = lamina.get_peft_model(dense(), lamina.LoraConfig(**CONFIG))
    with pytest.raises(ValueError, match="No bnb LoRA module found"):
        lamina.replace_lora_weights_loftq(model, on_disk(tmp_path))
