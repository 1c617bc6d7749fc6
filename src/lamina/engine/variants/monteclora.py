"""MonteCLoRA: while training, A is the mean of samples drawn around it, with learned spread.

Source: arXiv:2411.04358.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributions import Wishart
from torch.nn import functional as F

from lamina.engine.dtypes import exact
from lamina.engine.variants.base import Update
from lamina.engine.variants.plain import PlainLora

_PLACE = "lora_monteclora_sampler"
_LEAST_VARIANCE = 1e-3
_LEAST_WEIGHT = 1e-6


class MontecloraSampler(nn.Module):
    """Draws `num_samples` deviations of A, and the weights by which they are averaged.

    Args:
        in_features: columns of A.
        out_features: rows of A, its rank.
        num_samples: how many deviations a forward averages.
        use_entropy: add the weights' concentration to the penalty.
        dirichlet_prior: concentration of the prior over the weights.
        sample_scaler: factor on the deviations.
        kl_loss_weight: factor on the divergence from the priors.
        buffer_size: accepted; a draw is made when it is needed, and none is kept.
        device: where the parameters lie.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_samples: int,
        use_entropy: bool = True,
        dirichlet_prior: float = 1.0,
        sample_scaler: float = 3e-4,
        kl_loss_weight: float = 1e-5,
        buffer_size: int = 10,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features, self.out_features = in_features, out_features
        self.num_samples, self.buffer_size = num_samples, buffer_size
        self.use_entropy, self.dirichlet_prior = use_entropy, dirichlet_prior
        self.sample_scaler, self.kl_loss_weight = sample_scaler, kl_loss_weight
        self.std_prior = nn.Parameter(torch.rand(out_features, **options))
        self.expert_weights_prior = nn.Parameter(torch.rand(num_samples, **options))
        self.gaussian_var_prior: torch.Tensor
        self.expert_weights: torch.Tensor
        self.register_buffer("gaussian_var_prior", torch.eye(out_features, **options))
        self.register_buffer(
            "expert_weights", torch.full((num_samples,), 1 / num_samples, **options)
        )

    @torch.no_grad()
    def begin(self) -> None:
        """Give parameters and buffers, which may have come from the meta device, their values."""
        nn.init.uniform_(self.std_prior)
        nn.init.uniform_(self.expert_weights_prior)
        self.gaussian_var_prior = torch.eye(self.out_features).to(self.std_prior)
        self.expert_weights = torch.full((self.num_samples,), 1 / self.num_samples).to(
            self.std_prior
        )

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(deviations, weights): num_samples x in x rank, and num_samples, which sum to 1."""
        dtype = self.std_prior.dtype
        with exact(self.std_prior.device):
            spread = self._variance()
            weights = self._weights()
        self.gaussian_var_prior = torch.diag(spread).to(dtype)
        self.expert_weights = weights.to(dtype)
        drawn = torch.randn(
            (self.num_samples, self.in_features, self.out_features), device=spread.device
        )
        deviations = self.sample_scaler * drawn * spread.sqrt()
        return deviations.to(dtype), self.expert_weights

    def _variance(self) -> torch.Tensor:
        """The diagonal of a Wishart draw around `exp(std_prior)`, in fp32: shape (rank,)."""
        rank, device = self.out_features, self.std_prior.device
        wishart = Wishart(
            df=torch.tensor(float(rank), device=device),
            scale_tril=torch.eye(rank, device=device),
            validate_args=False,
        )
        with torch.no_grad():
            drawn = torch.diagonal(wishart._bartlett_sampling(torch.Size()))
        std = torch.exp(self.std_prior.float())
        return (std.square() * drawn).clamp(min=_LEAST_VARIANCE)

    def _weights(self) -> torch.Tensor:
        """A Dirichlet draw by its normal approximation in log space, in fp32."""
        count = self.num_samples
        alpha = torch.exp(self.expert_weights_prior.float()).clamp(min=_LEAST_WEIGHT)
        mean = alpha.log() - alpha.log().mean()
        variance = (1 - 2 / count) / alpha + (1 / alpha).sum() / count**2
        std = (variance.clamp(min=_LEAST_WEIGHT) + _LEAST_WEIGHT).sqrt()
        return torch.softmax(mean + std * torch.randn_like(std), dim=-1)

    def get_variational_loss(self) -> tuple[Any, Any]:
        """(weighted divergence from the priors, concentration of the weights); 0 outside training.

        The divergence is the sum of those of the weights (Dirichlet), of the spread's prior
        (Wishart) and of the deviations (normal), each in closed form.
        """
        if not self.training:
            return 0.0, 0.0
        divergence = self._dirichlet_kl() + self._wishart_kl() + self._normal_kl()
        entropy = self.expert_weights.square().sum() if self.use_entropy else 0
        return self.kl_loss_weight * divergence, entropy

    def _dirichlet_kl(self) -> torch.Tensor:
        alpha = torch.exp(self.expert_weights_prior.float())
        prior = torch.full_like(alpha, self.dirichlet_prior)
        of_gammas = torch.lgamma(alpha.sum()) - torch.lgamma(prior.sum())
        of_each = (torch.lgamma(prior) - torch.lgamma(alpha)).sum()
        expected = torch.digamma(alpha) - torch.digamma(alpha.sum())
        return of_gammas + of_each + ((alpha - prior) * expected).sum()

    def _wishart_kl(self) -> torch.Tensor:
        log_variance = 2 * self.std_prior.float()
        rank = self.out_features
        return 0.5 * rank * (torch.exp(log_variance).sum() - log_variance.sum() - rank)

    def _normal_kl(self) -> torch.Tensor:
        variance = torch.diagonal(self.gaussian_var_prior.float()).clamp(min=_LEAST_WEIGHT)
        spread = variance.sum() - variance.log().sum() - self.out_features
        return 0.5 * self.num_samples * spread


class Monteclora(PlainLora):
    """`y = base(x) + scaling * B(A'(dropout(x)))`, A' a mean of samples, or A."""

    is_plain = False
    places = (_PLACE,)
    kinds = ("linear",)

    def prepare(self, layer: Update, adapter: str, dtype: torch.dtype) -> None:
        A_RI = layer.factors(adapter)[0]
        settings = layer.records[adapter].config.monteclora_config
        layer.place(_PLACE)[adapter] = MontecloraSampler(
            A_RI.shape[1], A_RI.shape[0], **vars(settings), device="meta", dtype=dtype
        ).train(layer.training)

    def begin(self, layer: Update, adapter: str) -> None:
        sampler: Any = layer.place(_PLACE)[adapter]
        sampler.begin()

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        if not layer.training:
            return super().add(layer, adapter, x, result)
        held: Any = layer
        deviations, weights = held.lora_monteclora_sampler[adapter]()
        A_RI = layer.factors(adapter)[0]
        # The weights sum to 1, so that A itself is in the mean once.
        A_RI = A_RI + torch.einsum("n,nir->ri", weights, deviations).to(A_RI.dtype)
        low = F.linear(layer.dropped(adapter, x), A_RI)
        update: torch.Tensor = held.lora_B[adapter](low) * layer.records[adapter].scaling
        return result + update


def monteclora_penalty(layer: Any, adapter: str) -> Any:
    """What one layer adds to the loss: the divergence from the priors, and the concentration."""
    divergence, entropy = getattr(layer, _PLACE)[adapter].get_variational_loss()
    return divergence + entropy
