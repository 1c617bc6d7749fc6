"""Adapters begin with the numbers that they begin with in the real peft."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig as TheirCordaConfig
from peft.tuners.lora.eva import get_eva_state_dict as their_state_dict
from peft.tuners.lora.eva import initialize_lora_eva_weights as their_eva
from peft.tuners.lora.loraga import preprocess_loraga as their_loraga
from torch import Tensor, nn

import lamina
from lamina.config.methods import CordaConfig, EvaConfig, LoraGAConfig
from lamina.engine.layers import lora_layers
from lamina.engine.preparing import (
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from tests import models

# What peft warns of is not what is tested.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft",
    "ignore::FutureWarning",
    "ignore:Full backward hook is firing:UserWarning",
)


def _their_corda() -> Callable[..., None]:
    # peft takes a dataclass from a package that it doesn't depend on.
    stand_in = ModuleType("attr")
    stand_in.dataclass = dataclasses.dataclass
    with mock.patch.dict(sys.modules, attr=sys.modules.get("attr", stand_in)):
        return importlib.import_module("peft.tuners.lora.corda").preprocess_corda


their_corda = _their_corda()
X = torch.linspace(-2, 2, 60).reshape(5, 12).sin()
SAME = {"pissa", "olora", "mica"}


def two_layers() -> nn.Module:
    with models.seeded(0):
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))


def both(make: Callable[[], nn.Module], **config: Any) -> tuple[nn.Module, nn.Module]:
    return (
        lamina.get_peft_model(make(), lamina.LoraConfig(**config)),
        peft.get_peft_model(make(), peft.LoraConfig(**config)),
    )


def layers(ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    modules = dict(theirs.named_modules())
    return [(layer, modules[name]) for name, layer in lora_layers(ours)]


def assert_same_beginning(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-6) -> None:
    compared = layers(ours, theirs)
    assert compared
    for mine, other in compared:
        for place in ("lora_A", "lora_B"):
            a, b = (getattr(layer, place)["default"].weight for layer in (mine, other))
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(
            mine.base_layer.weight, other.base_layer.weight, atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("init", sorted(SAME))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_begin_the_same(init: str, dtype: torch.dtype) -> None:
    config = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["0", "2"],
        "init_lora_weights": init,
        "rank_pattern": {"2": 3},
    }
    ours, theirs = both(lambda: two_layers().to(dtype), **config)
    # One step of bf16 apart, where a sum lies between two.
    assert_same_beginning(ours, theirs, 1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("init", ["pissa", "mica"])
def test_layers_that_store_their_weight_across_begin_the_same(init: str) -> None:
    ours, theirs = both(
        models.tiny_gpt2, r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=init
    )
    assert_same_beginning(ours, theirs)


def test_mica_begins_embeddings_the_same() -> None:
    ours, theirs = both(
        models.tiny_llama, r=4, target_modules=["embed_tokens"], init_lora_weights="mica"
    )
    ((mine, other),) = layers(ours, theirs)
    for place in ("lora_embedding_A", "lora_embedding_B"):
        a, b = (getattr(layer, place)["default"] for layer in (mine, other))
        torch.testing.assert_close(a, b)
        assert a.requires_grad == b.requires_grad


@pytest.mark.parametrize(
    "init",
    ["pissa", "pissa_niter_4", "olora", "orthogonal", "mica", "gaussian", "eva", True, False],
)
def test_one_seed_means_one_adapter_in_both(init: bool | str) -> None:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], "init_lora_weights": init}
    with models.seeded(3):
        ours = lamina.get_peft_model(two_layers(), lamina.LoraConfig(**config, **_settings(init)))
    with models.seeded(3):
        theirs = peft.get_peft_model(two_layers(), peft.LoraConfig(**config))
    assert_same_beginning(ours, theirs)


def _settings(init: bool | str) -> dict[str, Any]:
    # Ours would warn of defaults, too.
    return {"eva_config": EvaConfig()} if init == "eva" else {}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("init", [True, False])
def test_one_seed_means_one_convolution_in_both(init: bool, bias: bool) -> None:
    config = {"r": 4, "target_modules": ["stem"], "init_lora_weights": init, "lora_bias": bias}
    with models.seeded(3):
        ours = lamina.get_peft_model(models.convolution_net(2), lamina.LoraConfig(**config))
    with models.seeded(3):
        theirs = peft.get_peft_model(models.convolution_net(2), peft.LoraConfig(**config))
    other = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, other[name])


def corda_config(kind: Any, **settings: Any) -> dict[str, Any]:
    return {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["0", "2"],
        "init_lora_weights": "corda",
        "corda_config": kind(**settings),
    }


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_begins_the_same(method: str, tmp_path: Path) -> None:
    ours, theirs = two_layers(), two_layers()
    cache, covariances = tmp_path / "made" / "cache.pt", tmp_path / "covariances.pt"
    settings = {"corda_method": method}
    files = {"cache_file": str(cache), "covariance_file": str(covariances)}
    mine = lamina.LoraConfig(**corda_config(CordaConfig, **settings, **files))
    other = peft.LoraConfig(**corda_config(TheirCordaConfig, **settings))
    preprocess_corda(ours, mine, lambda: (ours(X), ours(X + 1)))
    their_corda(theirs, other, lambda: (theirs(X), theirs(X + 1)))
    assert_same_beginning(
        lamina.get_peft_model(ours, mine), peft.get_peft_model(theirs, other), 1e-5
    )

    # peft reads the files that we have written.
    again = two_layers()
    other = peft.LoraConfig(**corda_config(TheirCordaConfig, **settings, **files))
    their_corda(again, other)
    model = peft.get_peft_model(again, other)
    assert_same_beginning(lamina.get_peft_model(_decomposed(mine), mine), model, 1e-5)


def _decomposed(config: Any) -> nn.Module:
    model = two_layers()
    preprocess_corda(model, config)
    return model


def gpt2_ids() -> Tensor:
    return models.token_ids()[:1]


def test_corda_begins_layers_stored_across_the_same() -> None:
    ours, theirs = models.tiny_gpt2(), models.tiny_gpt2()
    shared = {"r": 4, "target_modules": ["c_fc"], "init_lora_weights": "corda"}
    mine = lamina.LoraConfig(**shared, corda_config=CordaConfig())
    other = peft.LoraConfig(**shared, fan_in_fan_out=True, corda_config=TheirCordaConfig())
    preprocess_corda(ours, mine, lambda: ours(gpt2_ids()))
    their_corda(theirs, other, lambda: theirs(gpt2_ids()))
    assert_same_beginning(
        lamina.get_peft_model(ours, mine), peft.get_peft_model(theirs, other), 1e-4
    )


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_ga_begins_the_same(direction: str, scale: str) -> None:
    shared = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["2"],
        "init_lora_weights": "lora_ga",
    }
    settings = {"direction": direction, "scale": scale}
    ours, theirs = two_layers(), two_layers()
    mine = lamina.LoraConfig(**shared, lora_ga_config=LoraGAConfig(**settings))
    other = peft.LoraConfig(**shared, lora_ga_config=peft.LoraGAConfig(**settings))
    preprocess_loraga(ours, mine, lambda: [(ours(x) ** 2).sum().backward() for x in (X, X + 1)])
    their_loraga(theirs, other, lambda: [(theirs(x) ** 2).sum().backward() for x in (X, X + 1)])
    torch.testing.assert_close(ours[2]._peft_loraga_grad, theirs[2]._peft_loraga_grad)
    with models.seeded(3):
        ours = lamina.get_peft_model(ours, mine)
    with models.seeded(3):
        theirs = peft.get_peft_model(theirs, other)
    assert_same_beginning(ours, theirs, 1e-4)


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(count):
        with models.seeded(seed):
            ids = torch.randint(3, models.VOCABULARY, (4, 24))
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[:, -3:] = 0
        labels[:, :2] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@pytest.mark.parametrize(
    ("make", "targets", "settings"),
    [
        (models.tiny_llama, ["q_proj", "k_proj", "v_proj", "down_proj"], {"rho": 2.0}),
        (models.tiny_llama, ["q_proj", "down_proj"], {"rho": 1.0, "whiten": True, "tau": 0.9}),
        (models.tiny_gpt2, ["c_attn", "c_proj"], {"rho": 1.5, "use_label_mask": False}),
        (models.tiny_gpt2, ["c_attn"], {"rho": 1.5, "adjust_scaling_factors": False}),
    ],
)
def test_eva_begins_the_same(
    make: Callable[[], nn.Module], targets: list[str], settings: dict[str, Any]
) -> None:
    shared = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": "eva"}
    ours = lamina.get_peft_model(
        make(), lamina.LoraConfig(**shared, eva_config=EvaConfig(**settings))
    )
    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(**shared, eva_config=peft.EvaConfig(**settings))
    )
    mine = get_eva_state_dict(ours, batches(), show_progress_bar=False)
    other = their_state_dict(theirs, batches(), show_progress_bar=False)
    assert list(mine) == list(other)
    torch.testing.assert_close(mine, other)
    initialize_lora_eva_weights(ours, batches(), show_progress_bar=False)
    their_eva(theirs, batches(), show_progress_bar=False)
    assert_same_beginning(ours, theirs)
    for name in ("rank_pattern", "alpha_pattern"):
        a, b = (getattr(model.peft_config["default"], name) for model in (ours, theirs))
        assert a == b
    for mine_layer, their_layer in layers(ours, theirs):
        assert mine_layer.scaling["default"] == their_layer.scaling["default"]
