"""Arrow: each token goes to the experts, other adapters of the layer, whose updates fit it best.

Source: arXiv:2405.11157; general knowledge is subtracted as by GenKnowSub, arXiv:2505.10939.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.engine.dtypes import exact, to_adapter_input
from lamina.engine.variants.base import Update, Variant
from lamina.engine.variants.dora_norm import state_of
from lamina.errors import RoutingError

_PLACE = "lora_arrow"
# A general adapter, as `create_arrow_model` names it.
_GENERAL = re.compile(r"gks_\d+")
_ITERATIONS = 15
_TINY = 1e-8


class Arrow(Variant):
    """`y = base(x) + dropout(sum_e c_e(x) * s_e * B_e(A_e(x)))`, over all experts e of the layer.

    c(x) is the softmax, over the `top_k` experts with the largest `|x . p_e|`, of these divided by
    the temperature; p_e, an expert's prototype, is the first right singular vector of `B_e @ A_e`.
    With `use_gks` the mean of the general adapters is taken from A_e and from B_e first; what the
    experts hold stays as it is. The router's own factors take no part.

    Experts are all adapters of the layer but routers and general ones, so that they may be added
    and removed.
    """

    places = (_PLACE,)

    def prepare(self, layer: Update, adapter: str, dtype: torch.dtype) -> None:
        router = Router(layer.records[adapter].config.arrow_config)
        layer.place(_PLACE)[adapter] = router.train(layer.training)

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        router = _router(layer, adapter)
        experts = _experts(layer, router)
        router.see([expert.name for expert in experts])
        if getattr(layer, "cast_input_dtype_enabled", True):
            x = to_adapter_input(x, experts[0].A_RI.dtype)
        x_TI = x.reshape(-1, x.shape[-1])
        weights_TE = router(x_TI, experts)
        scalings = [layer.records[expert.name].scaling for expert in experts]
        scaled_TE = weights_TE * torch.tensor(scalings).to(weights_TE)
        update_TO: torch.Tensor = layer.lora_dropout[adapter](_mixed(x_TI, scaled_TE, experts))
        return result + update_TO.view(*x.shape[:-1], -1)

    def why_not_foldable(self, layer: Update, adapter: str) -> str | None:
        return "Cannot merge an active Arrow router adapter: it mixes experts for each token"


@dataclass(frozen=True)
class Expert:
    """What an adapter of the layer adds, without general knowledge if that is subtracted.

    Attributes:
        name: the adapter's.
        A_RI: rank x in.
        B_OR: out x rank.
        state: something that is different after it was changed.
    """

    name: str
    A_RI: torch.Tensor
    B_OR: torch.Tensor
    state: Hashable


class Router(nn.Module):
    """What decides which experts a token goes to, with their prototypes.

    Args:
        config: an `ArrowConfig`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k: int = config.top_k
        self.temperature: float = config.router_temperature
        self.rng_seed: int = config.rng_seed or 0
        self.use_gks: bool = config.use_gks
        self.task_adapter_names: list[str] = list(config.task_adapter_names or ())
        self.gks_adapter_names: list[str] = list(config.gks_adapter_names or ())
        # expert -> (what it was made from, prototype)
        self._kept: dict[str, tuple[Hashable, torch.Tensor]] = {}

    def see(self, names: list[str]) -> None:
        """Take note of the experts that are there.

        Raises:
            RoutingError: there are fewer than are to be chosen.
        """
        self.task_adapter_names = names
        if len(names) < self.top_k:
            raise RoutingError(
                f"Arrow shall choose top_k={self.top_k} experts, and there are {len(names)}: "
                f"{', '.join(names) or 'none'}.",
                cure=f"ArrowConfig(top_k={max(1, len(names))}), or load more experts",
            )

    def forward(self, x_TI: torch.Tensor, experts: Sequence[Expert]) -> torch.Tensor:
        """The weights of the experts for each token, (tokens x experts); zero but for `top_k`."""
        fit_TE = (x_TI @ self.prototypes(experts).T).abs()
        best, where = fit_TE.topk(self.top_k, dim=1)
        score = torch.full_like(fit_TE, float("-inf")).scatter(1, where, best)
        return torch.softmax(score / self.temperature, dim=1)

    def prototypes(self, experts: Sequence[Expert]) -> torch.Tensor:
        """The experts' prototypes, (experts x in); made anew where an expert has changed."""
        kept = {}
        for expert in experts:
            key, before = expert.state, self._kept.get(expert.name)
            if before is None or before[0] != key:
                made = self.top_right_singular_vec_from_BA(expert.A_RI, expert.B_OR)
                before = key, made.to(expert.A_RI.dtype)
            kept[expert.name] = before
        self._kept = kept
        return torch.stack([prototype for _, prototype in kept.values()])

    @torch.no_grad()
    def top_right_singular_vec_from_BA(
        self, A_RI: torch.Tensor, B_OR: torch.Tensor, iters: int = _ITERATIONS, eps: float = _TINY
    ) -> torch.Tensor:
        """The first right singular vector of `B @ A` by power iteration, in fp32: shape (in,)."""
        with exact(A_RI.device):
            a, b = A_RI.float(), B_OR.float()
            gram_RR = b.T @ b
            generator = torch.Generator(device=a.device).manual_seed(int(self.rng_seed))
            v: torch.Tensor = torch.randn(a.shape[1], device=a.device, generator=generator)
            v = v / (v.norm() + eps)
            for _ in range(iters):
                w = a.T @ (gram_RR @ (a @ v))
                v = w / (w.norm() + eps)
        return v


def _router(layer: Update, adapter: str) -> Router:
    router = layer.place(_PLACE)[adapter]
    assert isinstance(router, Router)
    return router


def _experts(layer: Update, router: Router) -> list[Expert]:
    """The layer's experts, in the order in which they were added."""
    general = [n for n in layer.records if n in router.gks_adapter_names or _GENERAL.fullmatch(n)]
    factors = {
        name: layer.factors(name)
        for name, record in layer.records.items()
        if not isinstance(record.variant, Arrow)
    }
    subtracted = [factors[name] for name in general] if router.use_gks else []
    means = [torch.stack(side).mean(0) for side in zip(*subtracted, strict=True)]
    common = tuple(state_of(factor) for pair in subtracted for factor in pair)
    experts = []
    for name, (a, b) in factors.items():
        if name in general:
            continue
        state = state_of(a), state_of(b), common
        experts.append(
            Expert(name, a - means[0], b - means[1], state) if means else Expert(name, a, b, state)
        )
    return experts


def _mixed(x_TI: torch.Tensor, weights_TE: torch.Tensor, experts: Sequence[Expert]) -> torch.Tensor:
    """`sum_e w_e * B_e(A_e(x))`, (tokens x out), without a tensor of tokens x experts x out."""
    ranks = torch.tensor([len(expert.A_RI) for expert in experts], device=x_TI.device)
    weights_TR = weights_TE.repeat_interleave(ranks, dim=1)
    inside_TR = x_TI @ torch.cat([expert.A_RI for expert in experts]).T
    return (inside_TR * weights_TR) @ torch.cat([expert.B_OR for expert in experts], dim=1).T
