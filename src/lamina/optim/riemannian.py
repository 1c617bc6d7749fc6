"""Riemannian preconditioning: the gradients of A and B in the metric of the matrices B @ A."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lamina.errors import OptimizerError
from lamina.optim.checks import check_class, check_number, refuse
from lamina.optim.experts import apart_A, apart_B, experts_of, together_B
from lamina.optim.factors import factor, pairs

FactorPair = tuple[nn.Parameter, nn.Parameter]


def trained_pairs(model: nn.Module) -> list[FactorPair]:
    """(A, B) of every adapted linear layer in which both ask for gradients.

    Embeddings and convolutions are left out; optimizers train them as they are.
    """
    return [(a, b) for a, b, _ in _found(model)]


def _found(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter, int]]:
    """The trained pairs, and of how many experts each is."""
    named = dict(model.named_parameters())
    names = [
        name
        for name, parameter in named.items()
        if parameter.requires_grad
        and parameter.ndim == 2
        and (known := factor(name)) is not None
        and not known.embedding
    ]
    return [
        (named[names[pair.a]], named[names[pair.b]], experts_of(model, pair.layer))
        for pair in pairs(names)
    ]


class RiemannianPreconditioner:
    """Multiplies gradients, in place, by the inverse r x r metric of the other factor.

    `gA <- (Bᵀ B + reg I)⁻¹ gA` and `gB <- gB (A Aᵀ + reg I)⁻¹`, computed in at least fp32 and
    rounded once to the gradient's dtype.

    Args:
        lora_pairs: (A, B), r x in and out x r.
        reg: the damping.
        experts: for each pair, of how many experts it is, each of which has metrics of its own;
            None: of one.
    """

    def __init__(
        self, lora_pairs: Iterable[FactorPair], reg: float, experts: Sequence[int] | None = None
    ) -> None:
        self.lora_pairs = list(lora_pairs)
        self.reg = reg
        self.experts = [1] * len(self.lora_pairs) if experts is None else list(experts)

    @torch.no_grad()
    def step(self) -> None:
        """Precondition the gradients that are there now."""
        for (a, b), experts in zip(self.lora_pairs, self.experts, strict=True):
            dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
            wide_A, wide_B = apart_A(a.to(dtype), experts), apart_B(b.to(dtype), experts)
            if a.grad is not None:
                metric = self._inverse(wide_B.mT @ wide_B)
                a.grad.copy_((metric @ apart_A(a.grad.to(dtype), experts)).flatten(0, 1))
            if b.grad is not None:
                metric = self._inverse(wide_A @ wide_A.mT)
                b.grad.copy_(together_B(apart_B(b.grad.to(dtype), experts) @ metric))

    def _inverse(self, gram: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        # B begins as zeros: with reg=0 there is no inverse, but there is a pseudo-inverse.
        inverse: torch.Tensor = torch.linalg.pinv(gram + self.reg * identity)
        return inverse


def create_riemannian_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    reg: float = 1e-2,
    **kwargs: Any,
) -> Optimizer:
    """An `optimizer_cls` that preconditions the gradients of A and B before every step.

    All that is trained besides the factors of linear layers, it trains as `optimizer_cls` does.

    Args:
        model: the adapted model.
        optimizer_cls: the class to make, e.g. `torch.optim.AdamW`; none that calls a closure.
        lr: the learning rate.
        reg: the damping, added to the diagonal of the r x r matrices that are inverted.
        kwargs: go to `optimizer_cls`.

    Raises:
        OptimizerError: with all that is wrong with the arguments; nothing has changed. Later, from
            `step`, when it is given a closure.

    Source: Zhang, Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models",
    arXiv:2402.02347.
    """
    found = _found(model)
    faults = [
        *(check_class(optimizer_cls) or _check_closure(optimizer_cls)),
        *check_number("lr", lr),
        *check_number("reg", reg),
    ]
    if not found:
        faults.append("the model has no lora_A/lora_B parameter pairs that train")
    refuse("create_riemannian_optimizer", faults)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make: Any = optimizer_cls
    optimizer: Optimizer = make(trained, lr=lr, **kwargs)
    optimizer.register_step_pre_hook(_Before(trained, found, reg))
    return optimizer


class _Before:
    """Preconditions before a step, the parameters taken from where the optimizer has them.

    Sharding replaces an optimizer's parameters after it was made; their places stay.
    """

    def __init__(
        self,
        trained: list[nn.Parameter],
        found: list[tuple[nn.Parameter, nn.Parameter, int]],
        reg: float,
    ) -> None:
        places = {id(parameter): place for place, parameter in enumerate(trained)}
        self.places = [(places[id(a)], places[id(b)]) for a, b, _ in found]
        self.experts = [experts for _, _, experts in found]
        self.reg = reg

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # torch passes the optimizer itself along as the first argument.
        if any(value is not None for value in (*args[1:2], kwargs.get("closure"))):
            raise OptimizerError(
                "A preconditioned optimizer does not support closures: they would compute the "
                "gradients anew after these have been preconditioned.",
                cure="loss.backward(), then optimizer.step() without arguments",
            )
        parameters = optimizer.param_groups[0]["params"]
        now = [(parameters[a], parameters[b]) for a, b in self.places]
        RiemannianPreconditioner(now, self.reg, self.experts).step()


def _check_closure(optimizer_cls: type[Optimizer]) -> list[str]:
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is None or closure.default is not inspect.Parameter.empty:
        return []
    return [f"{optimizer_cls.__name__} requires a closure, whose gradients are not preconditioned"]


# By these names, code in the wild imports them.
_collect_lora_pairs = trained_pairs
_RiemannianPreconditioner = RiemannianPreconditioner
