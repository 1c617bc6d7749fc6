"""The settings of single methods: what `LoraConfig` holds in its fields of these types.

Names and defaults are those of Hugging Face PEFT.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lamina.config.types import merged, set_strange_aside
from lamina.errors import ConfigError


class MethodConfig:
    """The base of a method's settings: it refuses, in one error, all values that are wrong."""

    def __post_init__(self) -> None:
        strange = set_strange_aside(self)
        faults = merged(self.faults(), strange)
        if faults:
            name = type(self).__name__
            raise ConfigError(
                f"{len(faults)} setting(s) of this {name} are wrong.",
                faults=faults,
                cure=f"correct them and build the {name} again",
            )

    def faults(self) -> list[str]:
        """A line for each value that is wrong."""
        return []

    def _beyond(self, limits: Mapping[str, tuple[float, float]]) -> list[str]:
        """A line for each field whose number lies outside of its limits, both included."""
        lines = []
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high or abs(value) > sys.float_info.max:
                lines.append(_limit(name, value, low, high))
        return lines

    def _strangers(self, choices: Mapping[str, Sequence[str]]) -> list[str]:
        """A line for each field whose value is none of its choices."""
        return [
            f"Unsupported `{name}` {getattr(self, name)!r}. Supported values are {_spoken(known)}."
            for name, known in choices.items()
            if getattr(self, name) not in known
        ]


_NO_LIMIT = float("inf")
_TINY = 1e-12


def _limit(name: str, value: object, low: float, high: float) -> str:
    if high < _NO_LIMIT:
        return f"{name}={value!r}: `{name}` must be between {low} and {high}."
    # EVA's rho is a factor: its least value, 1.0, is said.
    if low == _TINY or (low == 1 and isinstance(low, int)):
        return f"`{name}` should be positive, got {value!r}."
    least = "non-negative" if low == 0 else f">= {low}"
    return f"{name}={value!r}: `{name}` must be {least}"


def _spoken(names: Sequence[str]) -> str:
    shown = [repr(name) for name in names]
    if len(shown) < 3:
        return " and ".join(shown)
    return f"{', '.join(shown[:-1])}, and {shown[-1]}"


@dataclass
class LoraRuntimeConfig(MethodConfig):
    """What concerns this process only; never saved.

    Args:
        ephemeral_gpu_offload: do what an initialisation computes on a GPU, if there is one, though
            the weights lie in the CPU's memory.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig(MethodConfig):
    """LoftQ: factors that make up for what quantisation loses. Source: arXiv:2310.08659.

    Args:
        loftq_bits: 2, 4 or 8 bits of the quantisation.
        loftq_iter: how often quantisation and factorisation alternate.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def faults(self) -> list[str]:
        lines = self._beyond({"loftq_iter": (1, _NO_LIMIT)})
        if self.loftq_bits not in (2, 4, 8):
            lines.append(f"loftq_bits={self.loftq_bits!r}: one of 2, 4, 8")
        return lines


@dataclass
class EvaConfig(MethodConfig):
    """EVA: A begins as the directions in which a layer's inputs vary. Source: arXiv:2410.07170.

    Args:
        rho: a layer's rank may become up to `r * rho`.
        tau: cosine similarity of two steps' directions above which the search stops, 0 to 1.
        use_label_mask: leave positions out whose label is `label_mask_value`.
        label_mask_value: the label of positions that don't count.
        whiten: divide the directions by their singular values.
        adjust_scaling_factors: scale so that gradients are alike whatever a layer's rank.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def faults(self) -> list[str]:
        return self._beyond({"rho": (1.0, _NO_LIMIT), "tau": (0.0, 1.0)})


@dataclass
class CordaConfig(MethodConfig):
    """CorDA: a decomposition oriented by the inputs' covariance. Source: arXiv:2406.05223.

    Args:
        cache_file: where the decomposition is kept, to be used again.
        covariance_file: where the covariances are kept.
        corda_method: "ipm" (instruction-previewed) or "kpm" (knowledge-preserved).
        verbose: report progress.
        use_float16_for_covariance: half the memory, fewer digits.
        prune_temporary_fields: drop what the preprocessing left on the layers.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def faults(self) -> list[str]:
        return self._strangers({"corda_method": ("ipm", "kpm")})


@dataclass
class LoraGAConfig(MethodConfig):
    """LoRA-GA: factors that follow the first full gradient. Source: arXiv:2407.05000.

    Args:
        direction: which singular vectors of the gradient become A and B.
        scale: how the factors are scaled.
        stable_gamma: gamma of the "stable" scale.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16

    def faults(self) -> list[str]:
        choices = {
            "direction": ("ArBr", "A2rBr", "ArB2r", "random"),
            "scale": ("stable", "weight_svd", "gd_scale", "unit"),
        }
        return self._strangers(choices) + self._beyond({"stable_gamma": (_TINY, _NO_LIMIT)})


@dataclass
class VeloraConfig(MethodConfig):
    """VeLoRA: inputs kept for the backward as projections. Source: arXiv:2405.17991.

    Args:
        num_groups: into how many groups the input's features are divided.
        scale: a factor on what is reconstructed.
        init_type: what the projection is made from.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def faults(self) -> list[str]:
        limits = {"num_groups": (1, _NO_LIMIT), "scale": (_TINY, _NO_LIMIT)}
        choices = {"init_type": ("batch_average_once", "batch_average", "random")}
        return self._beyond(limits) + self._strangers(choices)


@dataclass
class MontecloraConfig(MethodConfig):
    """MonteCLoRA: samples around A are averaged while training. Source: arXiv:2411.04358.

    Args:
        num_samples: how many samples a forward draws.
        use_entropy: regularise the entropy of the samples' weights.
        dirichlet_prior: concentration of the prior over the samples' weights.
        sample_scaler: how far samples lie from A.
        kl_loss_weight: weight of the divergence from the prior in the loss.
        buffer_size: how many draws are made at a time.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def faults(self) -> list[str]:
        limits = {
            "num_samples": (1, _NO_LIMIT),
            "dirichlet_prior": (_TINY, _NO_LIMIT),
            "buffer_size": (1, _NO_LIMIT),
        }
        return self._beyond(limits)


@dataclass
class BdLoraConfig(MethodConfig):
    """BD-LoRA: block-diagonal factors, for tensor-parallel serving. Source: arXiv:2510.23346.

    Args:
        target_modules_bd_a: parts of names of the modules whose A is block-diagonal.
        target_modules_bd_b: parts of names of the modules whose B is block-diagonal.
        nblocks: how many blocks: the degree of sharding to serve with.
        match_strict: refuse targets that are in neither list.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def faults(self) -> list[str]:
        lists = (self.target_modules_bd_a, self.target_modules_bd_b)
        of_a, of_b = (names if isinstance(names, (list, tuple, set)) else () for names in lists)
        both = sorted(str(name) for name in of_a if name in of_b)
        lines = self._beyond({"nblocks": (1, _NO_LIMIT)})
        return lines + [f"Found overlapping modules in target_modules_bd lists: {both}"] * bool(
            both
        )


@dataclass
class ArrowConfig(MethodConfig):
    """Arrow: adapters are mixed by the input's fit to each. Source: arXiv:2405.11157.

    Args:
        top_k: how many adapters take part per token.
        router_temperature: of the softmax over their scores.
        use_gks: subtract the general adapters' mean first (GenKnowSub).
        rng_seed: seed of what is drawn.

    Attributes:
        task_adapter_names: the adapters to mix; set by `create_arrow_model`.
        gks_adapter_names: the general ones; likewise.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def faults(self) -> list[str]:
        limits = {"top_k": (1, _NO_LIMIT), "router_temperature": (_TINY, _NO_LIMIT)}
        return self._beyond(limits)


@dataclass
class KasaConfig(MethodConfig):
    """KaSA: a learned diagonal between B and A, over a truncated base. Source: arXiv:2412.06071.

    Args:
        beta: weight of the diagonal's L2 penalty.
        gamma: weight of the penalty on B and A that aren't orthogonal.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def faults(self) -> list[str]:
        return self._beyond({"beta": (0.0, _NO_LIMIT), "gamma": (0.0, _NO_LIMIT)})
