"""What passes over data refuse: everything at once, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina.config.methods import CordaConfig, EvaConfig, LoraGAConfig
from lamina.engine.preparing import (
    IncrementalPCA,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from lamina.errors import ConfigError, InitialisationError, MissingFileError
from tests import models


class Branches(nn.Module):
    """A net one of whose layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        with models.seeded(0):
            self.near, self.far = nn.Linear(12, 8), nn.Linear(8, 6)
            self.never, self.nor = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.far(torch.tanh(self.near(x)))


def rows(seed: int = 0, count: int = 30) -> torch.Tensor:
    with models.seeded(seed):
        return torch.randn(count, 12)


def eva_config(targets: list[str], r: int = 2, **settings: Any) -> lamina.LoraConfig:
    return lamina.LoraConfig(
        r=r,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=EvaConfig(**settings),
    )


def eva(
    data: Any, targets: list[str], make: Callable[[], nn.Module] = Branches, **settings: Any
) -> dict[str, torch.Tensor]:
    config = eva_config(targets, **settings)
    return get_eva_state_dict(
        make(),
        data,
        config,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )


@pytest.mark.parametrize("data", [[], iter(())])
def test_an_empty_dataloader(data: Any) -> None:
    with pytest.raises(ValueError, match="dataloader is empty"):
        eva(data, ["near"])


def test_layers_that_the_forward_never_reaches_are_all_told() -> None:
    with pytest.raises(InitialisationError) as caught:
        eva([rows()], ["near", "never", "nor"])
    assert caught.value.faults == ("never", "nor")


def test_nan_in_the_data_is_told_for_each_layer_and_leaves_no_hook() -> None:
    broken = rows()
    broken[3, 4] = float("nan")
    model = Branches()
    with pytest.raises(InitialisationError) as caught:
        eva([broken], ["near", "far"], lambda: model)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["near", "far"]
    assert not model.near._forward_hooks
    assert model.training


def test_more_directions_than_inputs() -> None:
    with pytest.raises(InitialisationError) as caught:
        eva([rows()], ["near", "far"], r=7, rho=2.0)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["near", "far"]


def test_batches_that_are_too_small_to_ever_settle() -> None:
    with pytest.raises(InitialisationError, match="No batch has enough rows") as caught:
        eva([rows(count=3)], ["near"])
    assert caught.value.faults == ("near: 4",)


def test_a_dataloader_that_can_be_gone_through_once() -> None:
    once = eva(iter([rows(0), rows(1)]), ["near", "far"])
    again = eva([rows(0), rows(1)], ["near", "far"])
    assert once.keys() == again.keys()
    for name, directions in once.items():
        assert torch.equal(directions, again[name])


def test_eva_finds_the_directions_in_which_inputs_vary() -> None:
    with models.seeded(1):
        plane = torch.linalg.qr(torch.randn(12, 2))[0]
        data = [torch.randn(50, 2) @ plane.T + 1e-3 * torch.randn(50, 12) for _ in range(3)]
    found = eva(data, ["near"], rho=1.0)["near"].float()
    torch.testing.assert_close(found.T @ found, plane @ plane.T, atol=1e-3, rtol=0)


def adapted(**settings: Any) -> Any:
    return lamina.get_peft_model(Branches(), eva_config(["near", "far"], **settings))


def test_a_state_dict_of_another_model_changes_nothing() -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prefix = "base_model.model."
    wrong = {
        f"{prefix}near": torch.zeros(2, 11),
        f"{prefix}far": torch.full((2, 8), torch.nan),
        "x": torch.zeros(1, 1),
    }
    with pytest.raises(InitialisationError) as caught:
        initialize_lora_eva_weights(model, eva_state_dict=wrong)
    assert len(caught.value.faults) == 3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_layers_without_a_rank_are_no_longer_adapted(tmp_path: Path) -> None:
    model = adapted()
    prefix = "base_model.model."
    directions = {f"{prefix}near": torch.eye(3, 12), f"{prefix}far": torch.zeros(0, 8)}
    initialize_lora_eva_weights(model, eva_state_dict=directions)
    assert type(model.base_model.model.far) is nn.Linear
    layer = model.base_model.model.near
    assert torch.equal(layer.lora_A["default"].weight, torch.eye(3, 12))
    assert layer.lora_A["default"].weight.requires_grad
    assert not layer.lora_B["default"].weight.any()
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    loaded = lamina.PeftModel.from_pretrained(Branches(), tmp_path)
    assert loaded.base_model.model.near.r["default"] == 3


def test_adapters_on_meta_get_their_weights() -> None:
    model = lamina.get_peft_model(Branches(), eva_config(["near", "far"]), low_cpu_mem_usage=True)
    assert model.base_model.model.near.lora_A["default"].weight.is_meta
    initialize_lora_eva_weights(
        model,
        [rows(0), rows(1)],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_base_on_meta_can_not_be_run() -> None:
    with torch.device("meta"):
        model = Branches()
    with pytest.raises(InitialisationError, match="on the meta device"):
        eva([rows()], ["near"], lambda: model)


def corda(targets: list[str], **settings: Any) -> lamina.LoraConfig:
    return lamina.LoraConfig(
        r=2,
        target_modules=targets,
        init_lora_weights="corda",
        corda_config=CordaConfig(**settings),
    )


def test_corda_tells_all_layers_that_data_does_not_reach() -> None:
    model = Branches()
    with pytest.raises(InitialisationError) as caught:
        preprocess_corda(model, corda(["near", "never", "nor"]), lambda: model(rows()))
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["never", "nor"]
    assert not any(hasattr(model.near, name) for name in ("eigens", "covariance_matrix"))


def test_corda_without_data_or_file() -> None:
    with pytest.raises(ValueError, match="run_model must be specified"):
        preprocess_corda(Branches(), corda(["near"]))


def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "cache.pt")
    model = Branches()
    preprocess_corda(model, corda(["near"], cache_file=path), lambda: model(rows()))
    with pytest.raises(MissingFileError, match="made for another model"):
        preprocess_corda(Branches(), corda(["far"], cache_file=path))


def loraga(targets: list[str]) -> lamina.LoraConfig:
    return lamina.LoraConfig(
        r=2,
        target_modules=targets,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )


def test_lora_ga_tells_all_layers_that_no_gradient_reaches() -> None:
    model = Branches()
    model.near.weight.requires_grad_(False)
    with pytest.raises(InitialisationError) as caught:
        preprocess_loraga(model, loraga(["near", "never"]), lambda: model(rows()).sum().backward())
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["never"]
    assert not model.near.weight.requires_grad
    assert model.near.weight.grad is None
    assert not hasattr(model.near, "_peft_loraga_grad")


def test_components_in_batches_are_those_of_all_rows() -> None:
    with models.seeded(2):
        data = torch.randn(60, 5, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 6).double())
    pca = IncrementalPCA(n_components=5, batch_size=20).fit(data)
    _, S, Vh = torch.linalg.svd(data - data.mean(0), full_matrices=False)
    torch.testing.assert_close(pca.singular_values_, S)
    torch.testing.assert_close(pca.components_.abs(), Vh.abs())
    torch.testing.assert_close(pca.mean_, data.mean(0))
    torch.testing.assert_close(pca.var_, data.var(0, unbiased=False))


def test_fewer_rows_than_components() -> None:
    with pytest.raises(ConfigError, match="batch number of samples 3"):
        IncrementalPCA(n_components=4).partial_fit(torch.zeros(3, 9))
