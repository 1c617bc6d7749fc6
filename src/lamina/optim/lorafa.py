"""LoRA-FA: A stays as it began, and B follows the gradient of the full weight."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from accelerate.utils.imports import is_bf16_available
from torch import nn
from torch.optim import Optimizer

from lamina.engine.inject import find_state
from lamina.errors import OptimizerError
from lamina.optim.checks import check_number, refuse
from lamina.optim.experts import apart_A, apart_B, experts_of, together_B
from lamina.optim.factors import Pair, factor, owner, pairs

# Keeps the r x r matrix of an A of dependent rows invertible.
_DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW over the projected gradients of B; A is read and never changed.

    `gB <- gB (A Aᵀ + 1e-8 I)⁻¹ / scaling²` is the gradient of B whose step of `scaling * B @ A` is
    nearest to that of the full weight. It then goes through AdamW (decoupled decay after the
    step), as does every other parameter that has a gradient. Where the machine has bf16, the
    projection is rounded to it, as peft's is; otherwise, and in fp64, it is not.

    State is kept by name: `<layer>.lora` for the B of a layer, `<layer>.lora.<adapter>` where a
    layer has several, and the parameter's own name for everything else.

    Args:
        params: groups that hold, beside `params`, their `names` in the model and
            `scaling_factors`, one for each (None where there is none); and `experts`, if any of
            them holds the factors of several.
        lr: the learning rate.
        betas: the decays of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled decay.
        correct_bias: whether the averages are corrected for having begun at zero.

    Raises:
        OptimizerError: with all that is wrong with the arguments.

    Source: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
    Fine-tuning", arXiv:2308.03303.
    """

    # Not set in __init__, which copies and unpickled optimizers don't go through.
    _warned = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        refuse(
            "LoraFAOptimizer",
            [
                *check_number("lr", lr),
                *check_number("betas[0]", betas[0], below=1.0),
                *check_number("betas[1]", betas[1], below=1.0),
                *check_number("eps", eps),
                *check_number("weight_decay", weight_decay),
            ],
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it has to say its parameters' `names` and `scaling_factors`."""
        parameters = param_group["params"]
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        refuse(
            "LoraFAOptimizer",
            _group_faults(param_group, len(parameters)),
            "create_lorafa_optimizer(model, r, lora_alpha, lr) makes the groups of a model",
        )
        super().add_param_group({**param_group, "params": parameters})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; with a closure, of the gradients that it computes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            scalings = self._scalings(group)
            matched = pairs(group["names"])
            for pair, key in zip(matched, _keys(matched), strict=True):
                self._step_pair(group, pair, key, scalings[pair.b])
            paired = {place for pair in matched for place in (pair.a, pair.b)}
            for place, parameter in enumerate(group["params"]):
                if place not in paired and parameter.grad is not None:
                    key = group["names"][place]
                    self._adamw(group, key, parameter, parameter.grad, "")
        return loss

    def _step_pair(self, group: dict[str, Any], pair: Pair, key: str, scaling: float) -> None:
        a, b = group["params"][pair.a], group["params"][pair.b]
        # An adapter that isn't active now has none.
        if b.grad is not None:
            experts = group["experts"][pair.b] if "experts" in group else 1
            # Where B @ A is multiplied by zero, the gradient is zero too.
            grad = projected(b.grad, a, scaling, experts) if scaling else b.grad
            self._adamw(group, key, b, grad, "_B")

    def _adamw(
        self, group: dict[str, Any], key: str, p: nn.Parameter, grad: torch.Tensor, suffix: str
    ) -> None:
        # Keys that are names, which torch's types don't foresee.
        state = self.state[key]  # type: ignore[index]
        mean, square = f"exp_avg{suffix}", f"exp_avg_sq{suffix}"
        if not state:
            state.update({"step": 0, mean: torch.zeros_like(p), square: torch.zeros_like(p)})
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state[mean].mul_(beta1).add_(grad, alpha=1.0 - beta1)
        state[square].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
        p.addcdiv_(state[mean], state[square].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0.0:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])

    def _scalings(self, group: dict[str, Any]) -> list[Any]:
        every = group.get("scaling_factor")
        own = group.get("scaling_factors")
        if own is not None:
            return [every if scaling is None else scaling for scaling in own]
        if not self._warned:
            self._warned = True
            warnings.warn(
                "`scaling_factor` is deprecated, because layers differ in theirs; give each "
                "parameter's in `scaling_factors`.",
                FutureWarning,
                stacklevel=3,
            )
        return [every] * len(group["params"])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, with copies on the parameters' devices and in their dtypes.

        Raises:
            OptimizerError: it was saved for parameters of other names; nothing has changed.
        """
        faults = [
            fault
            for ours, saved in zip(self.param_groups, state_dict["param_groups"], strict=False)
            for fault in _differences(ours["names"], saved.get("names", []))
        ]
        if faults:
            raise OptimizerError(
                "The saved state belongs to other parameters.",
                faults=faults,
                cure="make the optimizer over a model adapted as it was when the state was saved",
            )
        experts = [group.get("experts") for group in self.param_groups]
        super().load_state_dict(dict(state_dict))
        # A state that peft has saved doesn't say it.
        for group, counts in zip(self.param_groups, experts, strict=True):
            if counts is not None:
                group["experts"] = counts
        owners = dict(self._owners())
        # torch moves and casts only what is kept by parameter.
        kept: dict[Any, dict[str, Any]] = self.state
        for key, state in list(kept.items()):
            like = owners.get(key)
            kept[key] = {name: _copy_like(value, like) for name, value in state.items()}

    def _owners(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each key that state may be kept by, and the parameter that it is about."""
        for group in self.param_groups:
            yield from zip(group["names"], group["params"], strict=True)
            matched = pairs(group["names"])
            for pair, key in zip(matched, _keys(matched), strict=True):
                yield key, group["params"][pair.b]


def projected(
    grad: torch.Tensor, a: torch.Tensor, scaling: float, experts: int = 1
) -> torch.Tensor:
    """`grad (A Aᵀ + 1e-8 I)⁻¹ / scaling²`, shaped like `grad`, in its dtype.

    Args:
        grad: the gradient of B, out x r; of a convolution in groups, out x r/groups x 1.
        a: A, r x in, or r x in x kernel.
        scaling: by which B @ A is multiplied.
        experts: how many experts' factors lie side by side; each is projected by its own A.
    """
    if experts > 1:
        product = _times_inverse(apart_B(grad, experts), apart_A(a, experts))
        return ((1 / scaling**2) * together_B(product)).to(grad.dtype)
    flat = grad.flatten(1)
    groups = (a.shape[0] // flat.shape[1], -1)
    product = _times_inverse(flat.unflatten(0, groups), a.flatten(1).unflatten(0, groups))
    return ((1 / scaling**2) * product).reshape(grad.shape).to(grad.dtype)


def _times_inverse(grad: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    identity = torch.eye(wide.shape[-2], device=wide.device, dtype=wide.dtype)
    inverse = torch.linalg.pinv(wide @ wide.mT + _DAMPING * identity)
    dtype = wide.dtype
    if dtype != torch.float64 and is_bf16_available():
        dtype = torch.bfloat16
    product: torch.Tensor = grad.to(dtype) @ inverse.to(dtype)
    return product


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freeze every A and make the optimizer that trains the rest by LoRA-FA.

    The optimizer has one group of all the model's parameters, as peft's has; those without a
    gradient are left alone.

    Args:
        model: the adapted model.
        r: with `lora_alpha`, the scaling of layers that state none themselves; each of Lamina's
            states its own.
        lora_alpha: see `r`.
        lr: the learning rate.
        weight_decay: decoupled decay.
        use_rslora: deprecated; if given, it has to be what the active adapters' configs say.

    Raises:
        OptimizerError: with all that is wrong with the arguments; the model is unchanged.
    """
    state = find_state(model)
    active = {} if state is None else {name: state.configs[name] for name in state.active}
    named = list(model.named_parameters())
    faults = [
        *check_number("r", r, included=False),
        *check_number("lora_alpha", lora_alpha, included=False),
        *check_number("lr", lr),
        *check_number("weight_decay", weight_decay),
        *_rslora_faults(use_rslora, active),
    ]
    if not any(p.requires_grad and not _is_A(name) for name, p in named):
        faults.append("nothing but A would train, and LoRA-FA freezes A: see lamina.preflight")
    refuse("create_lorafa_optimizer", faults)
    if use_rslora is not None:
        warnings.warn(
            "`use_rslora` is deprecated: LoraConfig(use_rslora=...) says it.",
            FutureWarning,
            stacklevel=2,
        )
    for name, parameter in named:
        if _is_A(name):
            parameter.requires_grad_(False)
    rslora = bool(active) and all(config.use_rslora for config in active.values())
    group = {
        "params": [parameter for _, parameter in named],
        "lr": lr,
        "names": [name for name, _ in named],
        "scaling_factors": [_scaling(model, name) for name, _ in named],
        "scaling_factor": lora_alpha / (math.sqrt(r) if rslora else r),
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    experts = [_experts(model, name) for name, _ in named]
    if any(count > 1 for count in experts):
        group["experts"] = experts
    return LoraFAOptimizer([group])


def _rslora_faults(use_rslora: bool | None, active: Mapping[str, Any]) -> list[str]:
    if use_rslora is None:
        return []
    other = [name for name, config in active.items() if bool(config.use_rslora) != use_rslora]
    return [
        f"use_rslora={use_rslora} was passed to create_lorafa_optimizer, but the config of the "
        f"active adapter {name!r} says {not use_rslora}; leave the argument out"
        for name in other
    ]


def _is_A(name: str) -> bool:
    known = factor(name)
    return known is not None and known.side == "A"


def _scaling(model: nn.Module, name: str) -> float | None:
    """The scaling of the adapter that a parameter belongs to, in its layer; None for others."""
    owned = owner(name)
    if owned is None:
        return None
    layer, adapter = owned
    scalings = getattr(model.get_submodule(layer), "scaling", None)
    return scalings.get(adapter) if isinstance(scalings, Mapping) else None


def _experts(model: nn.Module, name: str) -> int:
    known = factor(name)
    return 1 if known is None else experts_of(model, known.layer)


def _group_faults(group: dict[str, Any], count: int) -> list[str]:
    faults = []
    names, scalings = group.get("names"), group.get("scaling_factors")
    if names is None or len(names) != count:
        faults.append(f"a group of {count} parameters needs as many `names`, to tell A from B")
    elif len(set(names)) != count:
        faults.append("`names` has a name twice")
    if scalings is None and "scaling_factor" not in group:
        faults.append("a group needs `scaling_factors`")
    elif scalings is not None and len(scalings) != count:
        faults.append(f"a group of {count} parameters needs as many `scaling_factors`")
    elif scalings is not None and names is not None and "scaling_factor" not in group:
        lacking = [names[pair.b] for pair in pairs(names) if scalings[pair.b] is None]
        faults += [f"`scaling_factors` has none for {name}" for name in lacking]
    return faults


def _keys(matched: Sequence[Pair]) -> list[str]:
    """What the state of each pair is kept by; see `LoraFAOptimizer`."""
    counts = Counter(pair.layer for pair in matched)
    return [
        ".".join(filter(None, (pair.layer, "lora", pair.adapter if counts[pair.layer] > 1 else "")))
        for pair in matched
    ]


def _differences(ours: Sequence[str], saved: Sequence[str]) -> list[str]:
    if list(ours) == list(saved):
        return []
    lacking = [name for name in ours if name not in set(saved)]
    unknown = [name for name in saved if name not in set(ours)]
    faults = []
    if lacking:
        faults.append(f"{len(lacking)} parameters are not in it, e.g. {lacking[0]}")
    if unknown:
        faults.append(f"{len(unknown)} of its parameters are not here, e.g. {unknown[0]}")
    return faults or ["its parameters come in another order"]


def _copy_like(value: Any, like: torch.Tensor | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if like is None:
        return value.clone()
    return value.to(device=like.device, dtype=like.dtype, copy=True)
