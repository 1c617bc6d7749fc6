"""`AdaLoraConfig`: LoRA whose ranks are shared out among the layers while it trains."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from lamina.config.base import PeftConfig, PeftType
from lamina.config.checks import LARGEST_RANK
from lamina.config.lora import LoraConfig

# What LoRA has and AdaLoRA has not; readers of its files would ignore it.
_WITHOUT = (
    "use_rslora",
    "lora_bias",
    "alpha_pattern",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
)


@dataclass
class AdaLoraConfig(LoraConfig):
    """An update by singular values: `W' = W + lora_alpha / ranknum * B @ (A * E)`.

    A (r x in) and B (out x r) are kept nearly orthogonal by a penalty on the loss, E (r x 1) are
    their singular values, `ranknum` is `init_r`. Training has three phases: `tinit` steps with all
    ranks; then, up to `total_step - tfinal`, the ranks that matter least are set to zero, fewer
    and fewer being left; then `tfinal` steps with those that are left.

        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()

    Args:
        target_r: the rank that a layer has on average in the end.
        init_r: the rank that every layer begins with.
        tinit: steps before ranks are taken away.
        tfinal: steps after the last rank was taken away.
        deltaT: steps from one allocation to the next.
        beta1: how slowly the importance of a parameter follows a step's, between 0 and 1.
        beta2: likewise, its uncertainty.
        orth_reg_weight: weight of the penalty `mean |A A^T - 1|, |B^T B - 1|` (Frobenius norms).
        total_step: how many steps training takes.
        rank_pattern: which ranks of a layer are left, by the name of its E; set in training.

    Raises:
        ConfigError: one error with everything that is wrong.

    Source: arXiv:2303.10512.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self._masks = self.rank_pattern
        self.rank_pattern = None
        super().__post_init__()
        self.rank_pattern = self._masks
        del self._masks
        self.peft_type = PeftType.ADALORA
        if self.r != LoraConfig.r:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored. `init_r` is the rank "
                "that every layer begins with.",
                stacklevel=3,
            )

    def ranks_left(self, target: str) -> list[bool] | None:
        """Which ranks of a layer are left, by its plain name; None before any were taken away."""
        return next(iter(self.masks_of(target).values()), None)

    def masks_of(self, target: str) -> dict[str, list[bool]]:
        """The entries of `rank_pattern` for a layer; there is one, or none."""
        masks = self.rank_pattern or {}
        return {key: m for key, m in masks.items() if key.rpartition(".lora_E")[0] == target}

    def _faults(self) -> list[str]:
        return [
            *super()._faults(),
            *self._faults_of_methods(),
            *self._faults_of_schedule(),
            *self._faults_of_allocation(),
            *_faults_of_masks(self._masks),
        ]

    def _faults_of_methods(self) -> list[str]:
        faults = []
        if self.use_dora:
            faults.append("ADALORA does not support DoRA: leave use_dora at False")
        if self.loftq_config:
            faults.append("ADALORA does not support LOFTQ: leave loftq_config out")
        if not isinstance(self.init_lora_weights, bool):
            faults.append(f"init_lora_weights={self.init_lora_weights!r}: True or False")
        faults += [
            f"{name}={getattr(self, name)!r}: AdaLoRA doesn't have it"
            for name in _WITHOUT
            if getattr(self, name)
        ]
        return faults

    def _faults_of_schedule(self) -> list[str]:
        counts = {name: getattr(self, name) for name in ("tinit", "tfinal", "total_step")}
        if self.total_step is None or not _is_count(self.total_step, 1):
            return ["AdaLoRA does not work when `total_step` is None, supply a value > 0."]
        faults = [f"{n}={v!r}: a number of steps" for n, v in counts.items() if not _is_count(v, 0)]
        if not faults and self.tinit >= self.total_step - self.tfinal:
            faults.append(
                "The supplied schedule values don't allow for a budgeting phase: lower tinit or "
                "tfinal, or raise total_step"
            )
        return faults

    def _faults_of_allocation(self) -> list[str]:
        least = {"target_r": 0, "init_r": 1, "deltaT": 1}
        faults = [
            f"{name}={getattr(self, name)!r}: an integer of at least {low}"
            for name, low in least.items()
            if not _is_count(getattr(self, name), low)
        ]
        faults += [
            f"{name}={value!r}: no layer has room for more than {LARGEST_RANK:,}"
            for name, value in (("target_r", self.target_r), ("init_r", self.init_r))
            if _is_number(value) and value > LARGEST_RANK
        ]
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < 1:
                faults.append(f"{name}={getattr(self, name)!r}: a number between 0 and 1")
        if not _is_number(self.orth_reg_weight) or not self.orth_reg_weight >= 0:
            faults.append(
                "`orth_reg_weight` should be greater than or equal to 0, but the value passed is "
                f"{self.orth_reg_weight}"
            )
        return faults


def _faults_of_masks(masks: Any) -> list[str]:
    if not isinstance(masks, dict | None):
        return [f"rank_pattern={masks!r}: a dict from names to lists of True and False"]
    return [
        f"rank_pattern[{name!r}]={mask!r}: a list of True and False"
        for name, mask in (masks or {}).items()
        if not isinstance(mask, list) or not all(isinstance(left, bool) for left in mask)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


PeftConfig._kinds[PeftType.ADALORA.value] = AdaLoraConfig
