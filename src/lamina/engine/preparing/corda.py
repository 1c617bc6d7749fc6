"""CorDA's pass over data: covariances of inputs, and the decomposition that they orient.

Source: arXiv:2406.05223.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.config.methods import CordaConfig
from lamina.engine.init.corda import ATTRIBUTE, CordaEigens
from lamina.engine.preparing import cache
from lamina.engine.preparing.linear import Target, linear_targets
from lamina.errors import InitialisationError

_TEMPORARY = ("sample_count", "covariance_matrix", "corda_method", "rank")
_PARTS = ("S_WC", "U_WC", "V_WC")
_MAX_ERROR = 0.05
_MAX_DAMP = 1e6


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Decompose each targeted linear layer's weight along its inputs' covariance.

    With C the mean of `x.T x` over the calls of a layer (inputs divided by their largest entry,
    C damped until it can be inverted): `W C = U S V.T`, and `W = U S (V.T C^-1)`. The first r
    directions ("ipm") or the last ("kpm") are left on the layer as `eigens`.

    Args:
        model: the model, before it is adapted.
        lora_config: with `corda_config`: the files to read or write, and the method.
        run_model: runs the model over the data; may be left out where a file has the results.
        hooked_model: the model that `run_model` runs, where that is another one.

    Raises:
        InitialisationError: with every layer that data doesn't reach, or whose inputs have NaN or
            Inf in them; nothing is left on the model.
    """
    settings = lora_config.corda_config or CordaConfig()
    assert isinstance(settings, CordaConfig)
    targets = linear_targets(model, lora_config)
    if settings.cache_file is not None and cache.is_there(settings.cache_file):
        _read_eigens(targets, settings.cache_file)
        return
    _covariances(model, lora_config, settings, targets, run_model, hooked_model)
    for target in _shown(targets, settings.verbose):
        target.module.corda_method, target.module.rank = settings.corda_method, target.r
        setattr(target.module, ATTRIBUTE, _eigens(target, settings.corda_method))
    if settings.prune_temporary_fields:
        for target in targets:
            _drop(target.module, _TEMPORARY)
    if settings.cache_file is not None:
        cache.write(settings.cache_file, dict(_named_parts(targets)))


def _read_eigens(targets: list[Target], path: str) -> None:
    names = [f"{target.name}.{ATTRIBUTE}.{part}" for target in targets for part in _PARTS]
    held = cache.read(path, names, _device(targets))
    for target in targets:
        parts = {part: held[f"{target.name}.{ATTRIBUTE}.{part}"] for part in _PARTS}
        setattr(target.module, ATTRIBUTE, CordaEigens(**parts))


def _named_parts(targets: list[Target]) -> Iterable[tuple[str, torch.Tensor]]:
    for target in targets:
        for part in _PARTS:
            yield f"{target.name}.{ATTRIBUTE}.{part}", getattr(target.module.eigens, part)


def _covariances(
    model: nn.Module,
    config: LoraConfig,
    settings: CordaConfig,
    targets: list[Target],
    run_model: Callable[[], object] | None,
    hooked_model: nn.Module | None,
) -> None:
    """Leave `covariance_matrix` on each target, from a file or from the data."""
    path = settings.covariance_file
    if path is not None and cache.is_there(path):
        held = cache.read(path, [target.name for target in targets], _device(targets))
        for target in targets:
            target.module.covariance_matrix = held[target.name]
        return
    if run_model is None:
        raise InitialisationError(
            "run_model must be specified when covariance file and cache file aren't built.",
            cure="preprocess_corda(model, lora_config, run_model=lambda: model(**batch))",
        )
    watched = model if hooked_model is None else hooked_model
    sources = targets if watched is model else linear_targets(watched, config)
    seen = _watch(watched, sources, run_model, half=settings.use_float16_for_covariance)
    faults = [
        f"{target.name}: {seen[target.name].fault}"
        for target in targets
        if (target.name in seen and seen[target.name].fault)
    ]
    faults += [
        f"{target.name}: no input reached it while run_model ran"
        for target in targets
        if target.name not in seen or not seen[target.name].count
    ]
    if faults:
        raise InitialisationError(
            f"CorDA can't begin {len(faults)} of {len(targets)} layers.",
            faults=faults[:8],
            cure="look at the data that run_model feeds, and leave layers that it doesn't use out "
            "of target_modules",
        )
    for target in targets:
        found = seen[target.name]
        target.module.sample_count = found.count
        target.module.covariance_matrix = found.total / found.count
    if path is not None:
        cache.write(path, {t.name: t.module.covariance_matrix for t in targets})


class _Covariance:
    """Sums `x.T x` over the calls of one layer."""

    def __init__(self, half: bool) -> None:
        self.half = half
        self.count = 0
        self.total: Any = 0
        self.fault: str | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        x = args[0].detach().flatten(0, -2)
        x = x if self.half else x.float()
        x = x / x.max().abs()
        product = x.T @ x
        if not bool(torch.isfinite(product).all()):
            bad = "input" if not bool(torch.isfinite(x).all()) else "covariance"
            self.fault = f"Invalid value found in {bad}, please check your input data"
        self.count += 1
        self.total = self.total + product


def _watch(
    model: nn.Module, targets: list[Target], run_model: Callable[[], object], *, half: bool
) -> dict[str, _Covariance]:
    """Run the model in eval mode; what each layer's inputs were like, by its name."""
    training = [(module, module.training) for module in model.modules()]
    seen = {target.name: _Covariance(half) for target in targets}
    handles = [t.module.register_forward_hook(seen[t.name]) for t in targets]
    model.eval()
    try:
        run_model()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
    return seen


def _eigens(target: Target, method: str) -> CordaEigens:
    weight: torch.Tensor = target.module.weight.data.float()
    W_OI = weight.T if target.stored_across else weight
    C_II, inverse = _invertible(target)
    U, S, Vh = torch.linalg.svd(W_OI @ C_II, full_matrices=False)
    V = (Vh @ inverse).T
    kept = slice(None, target.r) if method == "ipm" else slice(-target.r, None)
    # Copies: a slice would be written to disk, and kept in memory, with all that it is cut from.
    return CordaEigens(S[kept].clone(), U[:, kept].clone(), V[:, kept].clone())


def _invertible(target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """The covariance, damped until it can be inverted well, and its inverse."""
    C_II: torch.Tensor = target.module.covariance_matrix.float()
    eye = torch.eye(C_II.shape[0], device=C_II.device)
    damp = 0.01
    while damp < _MAX_DAMP:
        damped = C_II + eye * (C_II.diagonal().mean() * damp)
        inverse, singular = torch.linalg.inv_ex(damped)
        if not int(singular) and torch.dist(damped @ inverse, eye).item() < _MAX_ERROR:
            return damped, inverse
        damp *= 2
    raise InitialisationError(
        f"The covariance of the inputs of {target.name} can't be inverted.",
        faults=[f"its entries are at most {C_II.abs().max().item():.3g}"],
        cure="more, or more varied, samples in run_model",
    )


def _drop(module: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)


def _device(targets: list[Target]) -> torch.device:
    device: torch.device = targets[0].module.weight.device if targets else torch.device("cpu")
    return device


def _shown(targets: list[Target], verbose: bool) -> Iterable[Target]:
    if not verbose:
        return targets
    from tqdm import tqdm  # type: ignore[import-untyped]

    shown: Iterable[Target] = tqdm(targets, desc="CorDA: decomposing")
    return shown
