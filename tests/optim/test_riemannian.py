from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina.optim.riemannian import RiemannianPreconditioner, trained_pairs
from tests import models
from tests.optim.training import inputs, loss, moved, perceptron, run, weights


def riemannian(model: nn.Module, cls: Any = torch.optim.SGD, **changes: Any) -> Any:
    return lamina.create_riemannian_optimizer(model, cls, **{"lr": 1e-2} | changes)


def test_a_step_of_sgd_by_the_papers_formula() -> None:
    model = perceptron().double()
    before = weights(model)
    optimizer = riemannian(model, reg=0.05)
    loss(model, inputs().double()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    eye = 0.05 * torch.eye(4, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            b = before[name.replace("lora_A", "lora_B")]
            step = torch.linalg.solve(b.T @ b + eye, gradients[name])
        elif ".lora_B." in name:
            a = before[name.replace("lora_B", "lora_A")]
            step = torch.linalg.solve(a @ a.T + eye, gradients[name].T).T
        else:
            continue
        torch.testing.assert_close(parameter.detach(), before[name] - 1e-2 * step)


def test_half_precision_is_widened_for_the_inverse() -> None:
    with models.seeded(0):
        a = nn.Parameter(torch.randn(4, 6, dtype=torch.float16))
        b = nn.Parameter(300 * torch.randn(8, 4, dtype=torch.float16))
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
    # B' B is beyond fp16.
    expected = torch.linalg.solve(
        b.double().T @ b.double() + torch.eye(4, dtype=torch.float64), a.grad.double()
    )
    RiemannianPreconditioner([(a, b)], reg=1.0).step()
    assert a.grad.dtype == torch.float16
    torch.testing.assert_close(a.grad.double(), expected, rtol=2e-3, atol=1e-6)


def test_it_begins_from_a_zero_b_without_damping() -> None:
    config = lamina.LoraConfig(target_modules=["up", "down"], r=4)
    model = lamina.get_peft_model(models.perceptron(), config)
    before = weights(model)
    run(model, riemannian(model, reg=0.0), 1)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert {name for name in moved(before, model) if ".lora_B." in name}


def test_embeddings_and_frozen_halves_make_no_pair() -> None:
    config = lamina.LoraConfig(target_modules=["embed", "head"], r=2)
    model = lamina.get_peft_model(models.embedding_net(), config)
    head = model.get_base_model().head
    a, b = head.factors("default")
    assert [tuple(map(id, pair)) for pair in trained_pairs(model)] == [(id(a), id(b))]
    a.requires_grad_(False)
    assert trained_pairs(model) == []


def test_names_are_matched_whole() -> None:
    # peft replaces "lora_A" wherever it stands, so an adapter of that name has no pairs.
    model = lamina.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), lamina.LoraConfig(target_modules=["0"]), "lora_A"
    )
    assert len(trained_pairs(model)) == 1


def test_hooks_of_a_step_are_called_once() -> None:
    # peft's subclass calls the wrapped step from a wrapped step, and every hook twice.
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    model = perceptron()
    optimizer = riemannian(model)
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(args))
    run(model, optimizer, 3)
    assert len(calls) == 3


def test_parameters_that_were_replaced_in_the_optimizer_are_preconditioned() -> None:
    # Sharding puts others in their place; peft goes on preconditioning those it was made with.
    model = perceptron()
    optimizer = riemannian(model)
    other = copy.deepcopy(model)
    named = dict(other.named_parameters())
    optimizer.param_groups[0]["params"] = [
        named[name] for name, p in model.named_parameters() if p.requires_grad
    ]
    twin = copy.deepcopy(other)
    run(other, optimizer)
    run(twin, riemannian(twin))
    assert moved(weights(twin), other) == set()


def test_without_gradients_nothing_happens() -> None:
    model = perceptron()
    before = weights(model)
    riemannian(model).step()
    assert moved(before, model) == set()


def test_state_goes_on_after_a_restore_and_schedulers_work() -> None:
    model, other = perceptron(), perceptron()
    optimizer, again = (riemannian(m, torch.optim.AdamW) for m in (model, other))
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, again)]
    run(model, optimizer, 2)
    schedules[0].step()
    assert optimizer.param_groups[0]["lr"] == 5e-3
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedules[1].load_state_dict(schedules[0].state_dict())
    run(model, optimizer, 2, first=2)
    run(other, again, 2, first=2)
    assert moved(weights(model), other) == set()


def test_all_faults_in_one_error() -> None:
    with pytest.raises(lamina.OptimizerError) as caught:
        riemannian(models.perceptron(), torch.optim.LBFGS, lr=-1.0, reg=-1.0)
    message = str(caught.value)
    assert len(caught.value.faults) == 4
    assert "requires a closure" in message
    assert "lora_A/lora_B parameter pairs" in message
    for wrong in (TypeError, ValueError):
        with pytest.raises(wrong, match=r"subclass of torch\.optim\.Optimizer"):
            riemannian(perceptron(), dict)


@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_is_refused(keyword: bool) -> None:
    model = perceptron()
    optimizer = riemannian(model)
    before = weights(model)
    with pytest.raises(lamina.OptimizerError, match="does not support closures"):
        optimizer.step(closure=lambda: 0.0) if keyword else optimizer.step(lambda: 0.0)
    assert moved(before, model) == set()
    optimizer.step(None)
