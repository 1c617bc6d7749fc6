"""Choose targets by condition number: well-conditioned weights take a low-rank update best."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lamina.engine.weights import weight_of

_EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
_TINY = 1e-8


class KappaTuneSelector:
    """The condition numbers of a model's linear layers and fused experts.

    Args:
        model: the model; nothing is changed in it.
        max_dim_size_to_analyze: larger weights are left out, since an SVD of them takes long.
        moe_param_suffixes: endings of the names of experts' weights (experts x out x in).
        show_progress: show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or _EXPERTS
        self.show_progress = show_progress
        self._condition_numbers: dict[str, float] | None = None
        self._parameter_condition_numbers: dict[str, float] | None = None

    def _compute_kappas(self) -> None:
        if self._condition_numbers is not None:
            return
        linear = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        modules = {}
        for name, module in self._shown(linear):
            weight = weight_of(module).read().detach().float()
            if max(weight.shape) <= self.max_dim_size_to_analyze:
                modules[name] = _kappa(weight)
        experts = [
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if name.endswith(self.moe_param_suffixes) and parameter.dim() == 3
        ]
        parameters = {}
        for name, parameter in self._shown(experts):
            if max(parameter.shape[1:]) <= self.max_dim_size_to_analyze:
                kappas = [_kappa(expert) for expert in parameter.detach().float()]
                parameters[name] = sum(kappas) / len(kappas)
        self._condition_numbers, self._parameter_condition_numbers = modules, parameters

    def _shown(self, items: list[Any]) -> Iterable[Any]:
        if not self.show_progress:
            return items
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        bar: Iterable[Any] = tqdm(items, desc="Computing condition numbers")
        return bar

    def get_best_targets(
        self,
        top_p: float | None = None,
        num_modules: int | None = None,
        threshold: float | None = None,
    ) -> list[str]:
        """The linear layers, best first: all, a share, a number, or those up to a threshold."""
        self._compute_kappas()
        return _best(self._condition_numbers or {}, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self,
        top_p: float | None = None,
        num_modules: int | None = None,
        threshold: float | None = None,
    ) -> list[str]:
        """The experts' weights, best first: all, a share, a number, or up to a threshold."""
        self._compute_kappas()
        return _best(self._parameter_condition_numbers or {}, top_p, num_modules, threshold)


def _kappa(weight: torch.Tensor) -> float:
    values = torch.linalg.svdvals(weight)
    return float(values[0] / (values[-1] + _TINY))


def _best(
    kappas: dict[str, float], share: float | None, number: int | None, threshold: float | None
) -> list[str]:
    ranked = sorted(kappas, key=kappas.__getitem__)
    if not ranked:
        return []
    if number is not None:
        return ranked[:number]
    if share is not None:
        return ranked[: max(1, int(len(ranked) * share))]
    return ranked if threshold is None else [n for n in ranked if kappas[n] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """What to give as `target_modules` and `target_parameters`: the best-conditioned share."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
