"""Experts whose factors lie side by side: each by its own, as if it had a layer to itself.

peft multiplies all of A by itself, whose rows go by expert, and takes the result for a metric of
the columns of B, which go by rank.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.optim import lorafa
from lamina.optim.riemannian import RiemannianPreconditioner
from tests import models
from tests.optim.training import fill, moved, run, weights

EXPERTS, RANK, IN, OUT = 3, 2, 5, 4


def factors(seed: int) -> tuple[Tensor, Tensor]:
    """(experts, r, in) and (experts, out, r)."""
    with models.seeded(seed):
        return (
            torch.randn(EXPERTS, RANK, IN, dtype=torch.float64),
            torch.randn(EXPERTS, OUT, RANK, dtype=torch.float64),
        )


def joined(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As an adapter holds them: A by expert, B by rank."""
    return a.reshape(-1, IN), torch.stack([*b], dim=-1).reshape(OUT, -1)


def test_lorafa_projects_each_expert_by_itself() -> None:
    a, grad = factors(0)
    expected = torch.stack([lorafa.projected(grad[e], a[e], 0.5) for e in range(EXPERTS)])
    found = lorafa.projected(joined(a, grad)[1], joined(a, grad)[0], 0.5, EXPERTS)
    torch.testing.assert_close(found, joined(a, expected)[1])


def test_preconditioning_is_each_experts_own() -> None:
    (a, b), (grad_a, grad_b) = factors(0), factors(1)
    alone = []
    for e in range(EXPERTS):
        pair = (nn.Parameter(a[e]), nn.Parameter(b[e]))
        pair[0].grad, pair[1].grad = grad_a[e].clone(), grad_b[e].clone()
        RiemannianPreconditioner([pair], 0.1).step()
        alone.append(pair)
    whole = tuple(map(nn.Parameter, joined(a, b)))
    whole[0].grad, whole[1].grad = joined(grad_a, grad_b)
    RiemannianPreconditioner([whole], 0.1, [EXPERTS]).step()
    expected = joined(*(torch.stack([pair[side].grad for pair in alone]) for side in (0, 1)))
    torch.testing.assert_close(whole[0].grad, expected[0])
    torch.testing.assert_close(whole[1].grad, expected[1])


class Experts(nn.Module):
    """Three experts, of which each row is sent to one."""

    def __init__(self) -> None:
        super().__init__()
        with models.seeded(0):
            self.up = nn.Parameter(torch.randn(EXPERTS, OUT, IN))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.nn.functional.linear(x, self.up[e]) for e in range(EXPERTS)], 1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x).sum(1)


def adapted() -> lamina.PeftModel:
    config = lamina.LoraConfig(target_parameters=["experts.up"], target_modules=[], r=RANK)
    model = lamina.get_peft_model(Model(), config)
    fill(model)
    return model


@pytest.mark.parametrize("kind", ["lorafa", "riemannian"])
def test_the_optimizers_know_the_experts_of_a_model(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    seen: list[list[int]] = []
    if kind == "lorafa":
        optimizer = lamina.create_lorafa_optimizer(model, RANK, 8, lr=1e-2)
        group = optimizer.param_groups[0]
        seen.append([n for n in group["experts"] if n > 1])
    else:
        optimizer = lamina.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)
        step = RiemannianPreconditioner.step

        def spied(self: RiemannianPreconditioner) -> None:
            seen.append(self.experts)
            step(self)

        monkeypatch.setattr(RiemannianPreconditioner, "step", spied)
    before = weights(model)
    run(model, optimizer, 1, torch.linspace(-1, 1, 4 * IN).sin().reshape(4, IN))
    assert seen == ([[EXPERTS] * 2] if kind == "lorafa" else [[EXPERTS]])
    assert any("lora_B" in name for name in moved(before, model))
