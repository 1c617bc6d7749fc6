"""Parameters adapted by themselves: what is computed, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina.engine.layers.low_rank_sum import LowRankSum
from lamina.errors import RoutingError, TargetError
from tests import models


class Experts(nn.Module):
    """Two experts, each for its half of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 2
        self.up = nn.Parameter(torch.randn(2, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = [nn.functional.linear(half, self.up[i]) for i, half in enumerate(x.chunk(2))]
        return torch.cat(halves)


class Model(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.head = nn.Linear(6, 3)
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.inner(self.experts(x)))
        return out


def make(experts: type[nn.Module] = Experts) -> Model:
    with models.seeded(0):
        return Model(experts()).eval()


def adapted(model: nn.Module, **config: Any) -> Any:
    settings: dict[str, Any] = {
        "r": 2,
        "target_modules": [],
        "target_parameters": ["experts.up"],
        "init_lora_weights": False,
    }
    with models.seeded(1):
        return lamina.get_peft_model(model, lamina.LoraConfig(**settings | config))


def test_each_expert_has_factors_of_its_own_and_no_dense_update_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(LowRankSum, "dense")
    model = adapted(make(), lora_alpha=3)
    layer = model.get_base_model().experts
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (2 * 2, 4)
    assert b.shape == (6, 2 * 2)
    x = torch.randn(6, 4)
    rows = []
    for expert in range(2):
        a_e, b_e = a[expert * 2 : expert * 2 + 2], b[:, [expert, expert + 2]]
        weight = layer.get_param()[expert] + (3 / 2) * b_e @ a_e
        rows.append(x[expert * 3 : expert * 3 + 3] @ weight.T)
    torch.testing.assert_close(layer(x), torch.cat(rows))
    assert "up" not in layer.get_base_layer().__dict__


def test_inputs_of_experts_are_dropped_while_training() -> None:
    model = adapted(make(), lora_dropout=0.5)
    layer = model.get_base_model().experts
    base = layer.get_base_layer()
    x = torch.randn(2, 4)
    update = layer(x) - base(x)
    layer.train()
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([layer(x) - base(x) for _ in range(400)])
    assert not torch.allclose(mean[0], mean[1])
    error = (mean.mean(0) - update).abs().max() / mean.std(0).max()
    assert error < 6 / math.sqrt(400)


class _Exponent(Experts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.up.exp()[0].T


def test_dropout_needs_inputs_to_drop() -> None:
    model = adapted(make(_Exponent), lora_dropout=0.5)
    model(torch.randn(2, 4))
    model.train()
    with pytest.raises(TargetError, match="no inputs to drop"):
        model(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"target_parameters": ["experts.down"]}, "target_parameters: 'experts.down' matched 0"),
        ({"target_parameters": ["head.bias"]}, "has 1 dimensions"),
        ({"target_parameters": ["head.weight"], "target_modules": ["head"]}, "Trying to wrap"),
        ({"lora_bias": True}, "can't have a lora_bias"),
        ({"use_dora": True}, "DoRA"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict[str, Any], told: str) -> None:
    model = make()
    with pytest.raises(TargetError, match=told):
        adapted(model, **config)
    assert isinstance(model.experts, Experts)


def test_a_parameter_of_the_model_itself_is_refused() -> None:
    with pytest.raises(TargetError, match="top-level module"):
        adapted(Experts(), target_parameters=["up"])


def test_all_linear_tells_which_experts_it_leaves_out() -> None:
    with pytest.warns(UserWarning, match=r"target_parameters=\['experts.up'\]"):
        adapted(make(), target_modules="all-linear", target_parameters=None)
    adapted(make(), target_modules="all-linear")


def test_rows_can_not_go_to_different_adapters() -> None:
    model = adapted(make())
    with pytest.raises(RoutingError, match="mixed adapter batches"):
        model(torch.randn(2, 4), adapter_names=["default", "__base__"])


def test_the_order_in_which_parameters_are_adapted_does_not_matter() -> None:
    class Two(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Parameter(torch.randn(2, 6, 4))

    first = adapted(make(Two), target_parameters=["experts.more"])
    first.add_adapter(
        "both",
        lamina.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up", "experts.more"]),
    )
    at_once = adapted(make(Two), target_parameters=["experts.up", "experts.more"])
    assert (
        lamina.get_peft_model_state_dict(first, adapter_name="both").keys()
        == lamina.get_peft_model_state_dict(at_once).keys()
    )
    outer = first.get_base_model().experts
    assert [outer.parameter_name, outer.base_layer.parameter_name] == ["more", "up"]
