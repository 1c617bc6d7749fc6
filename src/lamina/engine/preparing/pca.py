"""Principal components of data that comes in batches.

After each batch the components are those of all data so far, up to what was cut off before: the
old components, weighed by their singular values, stand for the data that is gone.

Source: Ross et al., Incremental Learning for Robust Visual Tracking, 2008.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lamina.errors import ConfigError


class IncrementalPCA:
    """Incremental PCA on tensors, under the names of scikit-learn's.

    Args:
        n_components: how many to keep; None takes the smaller side of the first batch.
        copy: leave the data that is given as it is.
        batch_size: of `fit`; None takes five times the number of features.
        svd_driver: cuSOLVER's routine, on CUDA.
        lowrank: decompose by random subspace iterations, which is faster.
        lowrank_q: the rank of that; None takes twice `n_components`.
        lowrank_niter: how many iterations.
        lowrank_seed: of their random numbers.

    After the first batch:
        components_: n_components x features, orthonormal rows, the largest entry positive.
        singular_values_, explained_variance_, explained_variance_ratio_: n_components.
        mean_, var_: features, fp64.
        n_samples_seen_: 1.
        noise_variance_: a scalar.
    """

    components_: torch.Tensor
    singular_values_: torch.Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.copy = copy
        self.batch_size = batch_size
        self.svd_driver = svd_driver
        self.lowrank = lowrank
        self.lowrank_q = lowrank_q
        self.lowrank_niter = lowrank_niter
        self.lowrank_seed = lowrank_seed
        self.n_features_: int | None = None
        self.mean_: torch.Tensor | None = None
        self.var_: torch.Tensor | None = None
        if lowrank:
            self._settle_rank()

    def _settle_rank(self) -> None:
        if self.lowrank_q is None:
            if self.n_components is None:
                raise ConfigError(
                    "n_components must be specified when using lowrank mode with lowrank_q=None."
                )
            self.lowrank_q = 2 * self.n_components
        elif self.n_components is not None and self.lowrank_q < self.n_components:
            raise ConfigError("lowrank_q must be greater than or equal to n_components.")

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Take data (samples x features) in, batch by batch."""
        data = self._validate_data(X) if check_input else X
        n_samples, n_features = data.shape
        if self.batch_size is None:
            self.batch_size = 5 * n_features
        for batch in self.gen_batches(n_samples, self.batch_size, self.n_components or 0):
            self.partial_fit(data[batch], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Take one batch (samples x features) in.

        Raises:
            ConfigError: it has fewer samples or features than components, or other features than
                the batches before.
        """
        data = self._validate_data(X) if check_input else X
        n_samples, n_features = data.shape
        first = not hasattr(self, "components_")
        if first:
            self.n_samples_seen_ = torch.tensor([0], device=data.device)
            self.n_features_ = n_features
            self.n_components = self.n_components or min(n_samples, n_features)
        if n_features != self.n_features_:
            raise ConfigError(
                "Number of features of the new batch does not match the number of features of the "
                f"first batch: {n_features}, not {self.n_features_}."
            )
        mean, var, seen = self._incremental_mean_and_var(
            data, self.mean_, self.var_, self.n_samples_seen_
        )
        centred = data.sub_(mean) if first else self._with_what_went_before(data, seen)
        _, S, Vt = self._decompose(centred)
        self._keep(S, Vt, mean, var, seen, n_samples)
        return self

    def _with_what_went_before(self, data: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The batch about its mean, below the components so far, above the shift of the mean."""
        assert self.mean_ is not None
        batch_mean = data.mean(dim=0)
        weight = torch.sqrt((self.n_samples_seen_.double() / seen) * data.shape[0])
        shift = weight * (self.mean_ - batch_mean)
        before = self.singular_values_[:, None] * self.components_
        return torch.vstack((before, data.sub_(batch_mean), shift))

    def _decompose(self, centred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.lowrank:
            U, S, Vt = self._svd_fn_full(centred)
        else:
            U, S, Vt = self._svd_fn_lowrank(centred)
        U, Vt = self._svd_flip(U, Vt, u_based_decision=False)
        return U, S, Vt

    def _keep(
        self,
        S: torch.Tensor,
        Vt: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        seen: torch.Tensor,
        n_samples: int,
    ) -> None:
        count = self.n_components
        variance = S**2 / (seen - 1)
        self.n_samples_seen_, self.mean_, self.var_ = seen, mean, var
        self.components_ = Vt[:count]
        self.singular_values_ = S[:count]
        self.explained_variance_ = variance[:count]
        self.explained_variance_ratio_ = (S**2 / torch.sum(var * seen))[:count]
        exact = count in (n_samples, self.n_features_)
        self.noise_variance_ = S.new_tensor(0.0) if exact else variance[count:].mean()

    def transform(self, X: torch.Tensor) -> torch.Tensor:
        """The data's coordinates along the components: samples x n_components."""
        assert self.mean_ is not None
        centred = X - self.mean_
        return torch.mm(centred.double(), self.components_.double().T).to(X.dtype)

    def _svd_fn_full(self, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        U, S, Vh = torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)
        return U, S, Vh

    def _svd_fn_lowrank(self, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seeded = self.lowrank_seed is not None
        with torch.random.fork_rng(enabled=seeded):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            U, S, V = torch.svd_lowrank(X, q=self.lowrank_q, niter=self.lowrank_niter)
        return U, S, V.mH

    def _validate_data(self, X: Any) -> torch.Tensor:
        data = X if isinstance(X, torch.Tensor) else torch.tensor(X, dtype=torch.float32)
        if data is X and self.copy:
            data = data.clone()
        n_samples, n_features = data.shape
        wanted = self.n_components
        if wanted is not None and wanted > n_features:
            raise ConfigError(
                f"n_components={wanted} invalid for n_features={n_features}, need more rows than "
                "columns for IncrementalPCA processing."
            )
        if wanted is not None and wanted > n_samples:
            raise ConfigError(
                f"n_components={wanted} must be less or equal to the batch number of samples "
                f"{n_samples}"
            )
        return data if data.dtype in (torch.float32, torch.float64) else data.float()

    @staticmethod
    def _incremental_mean_and_var(
        X: torch.Tensor,
        last_mean: torch.Tensor | None,
        last_variance: torch.Tensor | None,
        last_sample_count: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and number of all samples, from those before and a batch; in fp64.

        Source: Chan, Golub, LeVeque, Algorithms for computing the sample variance, 1983.
        """
        if X.shape[0] == 0:
            assert last_mean is not None
            assert last_variance is not None
            return last_mean, last_variance, last_sample_count
        missing = [
            name
            for name, value in (("last_mean", last_mean), ("last_variance", last_variance))
            if value is None
        ]
        if last_sample_count > 0 and missing:
            raise ConfigError(f"{missing[0]} should not be None if last_sample_count > 0.")
        here = torch.tensor([X.shape[0]], device=X.device)
        total = last_sample_count + here
        new_sum = X.sum(dim=0, dtype=torch.float64)
        old_sum = (
            new_sum.new_zeros(X.shape[1]) if last_mean is None else last_mean * last_sample_count
        )
        deviations = X - new_sum / here
        correction = deviations.sum(dim=0, dtype=torch.float64).square() / here
        spread = deviations.square().sum(dim=0, dtype=torch.float64) - correction
        if last_variance is not None:
            ratio = last_sample_count.double() / here
            between = ratio / total * (old_sum / ratio - new_sum).square()
            spread = last_variance * last_sample_count + spread + between
        return (old_sum + new_sum) / total, spread / total, total

    @staticmethod
    def _svd_flip(
        u: torch.Tensor, v: torch.Tensor, u_based_decision: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Singular vectors with the signs that make the largest entry of each positive."""
        if u_based_decision:
            largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0]
        else:
            largest = v.gather(1, v.abs().argmax(dim=1, keepdim=True))[:, 0]
        signs = largest.sign()
        return u * signs[: u.shape[1]], v * signs[:, None]

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of `batch_size` over n samples; a rest below `min_batch_size` goes to the last."""
        start = 0
        for _ in range(n // batch_size):
            end = start + batch_size
            if end + min_batch_size > n:
                continue
            yield slice(start, end)
            start = end
        if start < n:
            yield slice(start, n)
