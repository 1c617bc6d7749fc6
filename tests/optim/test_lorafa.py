from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina.optim import LoraFAOptimizer, lorafa
from lamina.optim.lorafa import projected
from tests import models
from tests.optim.training import fill, inputs, loss, moved, perceptron, run, weights


def fa(model: nn.Module, **changes: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "lr": 1e-2}
    return lamina.create_lorafa_optimizer(model, **settings | changes)


def steered(model: nn.Module, *names: str) -> set[str]:
    """The parameters whose names hold one of `names`."""
    return {name for name, _ in model.named_parameters() if any(n in name for n in names)}


# --- the projection ---------------------------------------------------------------------------


def test_the_projection_is_the_nearest_to_the_full_gradient() -> None:
    # The step of the full weight is s B A; the nearest to g solves min |s gB A - g|, and the
    # gradient that backward gives for B is s g A'.
    with models.seeded(0):
        a = torch.randn(3, 7, dtype=torch.float64)
        full = torch.randn(5, 7, dtype=torch.float64)
    scaling = 1.7
    nearest = torch.linalg.lstsq(scaling * a.T, full.T).solution.T
    found = projected(scaling * full @ a.T, a, scaling)
    # `scaling² gB A A'` is what the normal equations have on the left.
    torch.testing.assert_close(found, nearest, rtol=1e-6, atol=1e-6)


def test_it_is_rounded_to_bf16_only_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    with models.seeded(0):
        a, grad = torch.randn(3, 7), torch.randn(5, 3)
    exact = grad.double() @ torch.linalg.inv(a.double() @ a.double().T)
    errors = []
    for available in (True, False):
        monkeypatch.setattr(lorafa, "is_bf16_available", lambda available=available: available)
        found = projected(grad, a, 1.0)
        assert found.dtype == torch.float32
        errors.append(float((found - exact).norm() / exact.norm()))
    assert 1e-4 < errors[0] < 1e-2
    assert errors[1] < 1e-5


def test_half_precision_is_widened_for_the_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    # peft multiplies A by itself in its own dtype: here beyond fp16, and the inverse fails.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    with models.seeded(0):
        a = (300 * torch.randn(3, 7)).half()
        grad = 300 * torch.randn(5, 3).half()
    exact = grad.double() @ torch.linalg.inv(a.double() @ a.double().T)
    found = projected(grad, a, 1.0)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-5)


def test_a_convolution_in_groups_is_projected_group_by_group() -> None:
    # peft transposes a tensor of four dimensions, which is no matrix of rank rows.
    with models.seeded(0):
        a = torch.randn(4, 3, 3, 3, dtype=torch.float64)
        grad = torch.randn(6, 2, 1, 1, dtype=torch.float64)
    found = projected(grad, a, 0.5)
    assert found.shape == grad.shape
    for group in range(2):
        rows = a[2 * group : 2 * group + 2].flatten(1)
        expected = 4 * grad[3 * group : 3 * group + 3, :, 0, 0] @ torch.linalg.inv(rows @ rows.T)
        torch.testing.assert_close(found[3 * group : 3 * group + 3, :, 0, 0], expected)


# --- what trains ------------------------------------------------------------------------------


def test_a_is_frozen_and_b_trains() -> None:
    model = perceptron()
    optimizer = fa(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora_A." in n)
    before = weights(model)
    run(model, optimizer)
    assert moved(before, model) == steered(model, ".lora_B.")


def test_an_embeddings_a_is_frozen_too() -> None:
    # peft looks for "lora_A": it pairs lora_embedding_A, never steps it, and leaves it asking for
    # a gradient as large as the vocabulary.
    config = lamina.LoraConfig(target_modules=["embed", "head"], r=2)
    model = lamina.get_peft_model(models.embedding_net(), config)
    fill(model)
    optimizer = fa(model, r=2)
    assert not model.get_base_model().embed.lora_embedding_A["default"].requires_grad
    before = weights(model)
    run(model, optimizer, 2, models.token_ids())
    assert moved(before, model) == steered(model, "lora_embedding_B", "lora_B")


def test_convolutions_train() -> None:
    # peft fails: A has four dimensions.
    config = lamina.LoraConfig(target_modules=["stem", "grouped"], r=4)
    model = lamina.get_peft_model(models.convolution_net(2), config)
    fill(model)
    before = weights(model)
    x = torch.linspace(-2, 2, 2 * 3 * 64).sin().reshape(2, 3, 8, 8)
    first = loss(model, x).item()
    run(model, fa(model), 1, x)
    assert moved(before, model) == steered(model, ".lora_B.")
    assert loss(model, x).item() < first


def test_biases_and_saved_modules_are_trained_by_plain_adamw() -> None:
    model = perceptron(bias="all", target_modules=["up"], modules_to_save=["down"])
    twin = perceptron(bias="all", target_modules=["up"], modules_to_save=["down"])
    optimizer = fa(model, weight_decay=0.1)
    plain = {
        name: p for name, p in twin.named_parameters() if p.requires_grad and "lora" not in name
    }
    # torch adds eps after the correction of the square, which is by the root of 1 - 0.999.
    eps = 1e-6 / 0.001**0.5
    other = torch.optim.AdamW(plain.values(), lr=1e-2, eps=eps, weight_decay=0.0)
    loss(model, inputs()).backward()
    loss(twin, inputs()).backward()
    optimizer.step()
    other.step()
    named = dict(model.named_parameters())
    assert len(plain) == 2
    for name, parameter in plain.items():
        # Decayed after the step, of which there is only one.
        torch.testing.assert_close(
            named[name].detach(), parameter.detach() * (1 - 1e-3), rtol=1e-4, atol=1e-6
        )


def test_several_adapters_in_a_layer() -> None:
    # peft takes A of one and A of the other for a pair, and fails; their state would be one too.
    model = perceptron()
    model.add_adapter("idle", lamina.LoraConfig(target_modules=["up"], r=2))
    model.add_adapter("second", lamina.LoraConfig(target_modules=["up"], r=2))
    model.set_adapter(["default", "second"], train=["default", "second"])
    fill(model)
    before = weights(model)
    optimizer = fa(model)
    run(model, optimizer)
    expected = steered(model, ".lora_B.default", ".lora_B.second")
    assert moved(before, model) == expected
    keys = {"up.lora.default", "up.lora.second", "down.lora"}
    assert set(optimizer.state) == {f"base_model.model.{key}" for key in keys}


class LoraNamed(nn.Module):
    """A base whose own modules are called lora."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_net = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_net(x)


def test_a_base_whose_names_hold_lora() -> None:
    # peft pairs whatever parameters have "lora" in their names: weight and bias of the base here.
    config = lamina.LoraConfig(target_modules=["0", "1"], r=2)
    model = lamina.get_peft_model(LoraNamed(), config)
    fill(model)
    before = weights(model)
    optimizer = fa(model)
    run(model, optimizer)
    assert moved(before, model) == steered(model, ".lora_B.")
    assert len(optimizer.state) == 2


def test_a_zero_scaling_divides_nothing() -> None:
    # peft divides by its square.
    model = perceptron()
    model.get_base_model().up.scaling["default"] = 0.0
    before = weights(model)
    run(model, fa(model), 1)
    assert moved(before, model) == steered(model, "down.lora_B")


def test_each_layers_own_scaling_counts() -> None:
    model = perceptron(rank_pattern={"up": 2}, use_rslora=True)
    group = fa(model).param_groups[0]
    found = dict(zip(group["names"], group["scaling_factors"], strict=True))
    path = "base_model.model"
    assert found[f"{path}.up.lora_B.default.weight"] == pytest.approx(6 / 2**0.5)
    assert found[f"{path}.down.lora_B.default.weight"] == pytest.approx(6 / 4**0.5)
    assert found[f"{path}.up.base_layer.weight"] is None
    assert group["scaling_factor"] == pytest.approx(6 / 2)


def test_gradients_are_checked_of_what_trains() -> None:
    model = perceptron()
    fa(model)
    loss(model, inputs()).backward()
    lamina.check_gradients(model)


# --- as an optimizer --------------------------------------------------------------------------


def test_state_goes_on_after_a_restore_and_is_no_longer_shared() -> None:
    # peft restores what it keeps by name as it is: the same tensors, wherever they are.
    model, other = perceptron(), perceptron()
    optimizer, again = fa(model), fa(other)
    run(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    saved = optimizer.state_dict()
    again.load_state_dict(saved)
    run(other, again, 2, first=3)
    run(model, optimizer, 2, first=3)
    assert moved(weights(model), other) == set()


def test_a_restored_state_has_the_parameters_dtype() -> None:
    model = perceptron(bias="all")
    optimizer = fa(model)
    run(model, optimizer, 1)
    half = copy.deepcopy(model).bfloat16()
    again = fa(half)
    again.load_state_dict(optimizer.state_dict())
    tensors = [v for s in again.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert len(tensors) == 6


def test_a_state_of_other_parameters_is_refused() -> None:
    # peft takes the saved names over, and projects by the A of another layer.
    model, other = perceptron(), perceptron(target_modules=["up"], bias="all")
    other.add_adapter("second", lamina.LoraConfig(target_modules=["up"]))
    optimizer, again = fa(model), fa(other)
    run(model, optimizer, 1)
    names = list(again.param_groups[0]["names"])
    with pytest.raises(lamina.OptimizerError, match=r"up\.lora_A\.second"):
        again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["names"] == names
    assert not again.state


def test_a_copy_steps_alike() -> None:
    model = perceptron()
    optimizer = fa(model)
    run(model, optimizer, 1)
    twin, other = copy.deepcopy((model, optimizer))
    run(model, optimizer, 2, first=1)
    run(twin, other, 2, first=1)
    assert moved(weights(model), twin) == set()


def test_a_scheduler_sets_the_rate() -> None:
    model = perceptron()
    optimizer = fa(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    run(model, optimizer, 1)
    schedule.step()
    before = weights(model)
    run(model, optimizer, 1)
    assert moved(before, model) == set()


def test_a_closure_computes_gradients() -> None:
    # peft calls it where no gradient can be computed.
    model, twin = perceptron(), perceptron()
    optimizer = fa(model)

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(model, inputs())
        value.backward()
        return value.item()

    assert optimizer.step(closure) == loss(twin, inputs()).item()
    run(twin, fa(twin), 1)
    assert moved(weights(twin), model) == set()


# --- refusals ---------------------------------------------------------------------------------


def test_all_faults_in_one_error_and_a_stays_as_it_was() -> None:
    model = perceptron()
    with pytest.raises(lamina.OptimizerError) as caught:
        fa(model, r=0, lora_alpha=-1, lr=float("inf"), weight_decay=-1.0, use_rslora=True)
    assert len(caught.value.faults) == 5
    assert "was passed to create_lorafa_optimizer" in str(caught.value)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_A." in n)


def test_nothing_to_train() -> None:
    model = perceptron()
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(lamina.OptimizerError, match="preflight"):
        fa(model)


def test_use_rslora_is_deprecated() -> None:
    with pytest.warns(FutureWarning, match="use_rslora"):
        fa(perceptron(), use_rslora=False)


def test_a_group_says_all_that_it_lacks() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(lamina.OptimizerError) as caught:
        LoraFAOptimizer([parameter], lr=-1.0)
    assert len(caught.value.faults) == 1
    with pytest.raises(lamina.OptimizerError) as caught:
        LoraFAOptimizer([parameter])
    assert len(caught.value.faults) == 2


def test_one_scaling_for_all_is_deprecated() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    group = {"params": [parameter], "names": ["x.weight"], "scaling_factor": 1.0}
    optimizer = LoraFAOptimizer([group])
    parameter.grad = torch.ones_like(parameter)
    with pytest.warns(FutureWarning, match="`scaling_factor` is deprecated"):
        optimizer.step()
    optimizer.step()
