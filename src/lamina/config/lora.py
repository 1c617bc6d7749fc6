"""`LoraConfig`: how an adapter of low rank is laid over a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from lamina.config import methods
from lamina.config.base import PeftConfig, PeftType
from lamina.config.beginnings import faults_of_beginnings, settle_beginnings
from lamina.config.checks import (
    faults_of_choices,
    faults_of_numbers,
    faults_of_targets,
    is_off,
)
from lamina.config.support import NOT_SUPPORTED
from lamina.errors import ConfigError, UnsupportedFieldError

ALL_LINEAR = "all-linear"

METHODS: dict[str, type[methods.MethodConfig]] = {
    "eva_config": methods.EvaConfig,
    "corda_config": methods.CordaConfig,
    "lora_ga_config": methods.LoraGAConfig,
    "velora_config": methods.VeloraConfig,
    "monteclora_config": methods.MontecloraConfig,
    "use_bdlora": methods.BdLoraConfig,
    "arrow_config": methods.ArrowConfig,
    "kasa_config": methods.KasaConfig,
    "runtime_config": methods.LoraRuntimeConfig,
}


@dataclass
class LoraConfig(PeftConfig):
    """How an adapter of low rank is laid over a model: `W' = W + scaling * B @ A`.

    `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.

    Args:
        r: the rank of A (r x in) and B (out x r).
        lora_alpha: the numerator of the scaling.
        lora_dropout: probability in [0, 1) of dropping an input of A, while training only.
        target_modules: names (whole, or their last components), one regular expression for the
            whole name, or "all-linear"; None takes what is usual for the architecture.
        exclude_modules: names or one regular expression, never adapted.
        layers_to_transform: indices of the layers to adapt; None adapts all.
        layers_pattern: the name of the list of layers, where it can't be told from the names.
        rank_pattern: name or regular expression -> r, where it differs.
        alpha_pattern: name or regular expression -> lora_alpha, where it differs.
        bias: the biases trained along: "none", "all", or those of adapted layers ("lora_only").
        use_rslora: scale by the root of the rank. Source: arXiv:2312.03732.
        lora_bias: give B a bias of its own.
        fan_in_fan_out: the weight is stored (in x out); found out by itself for `Conv1D`.
        modules_to_save: modules trained whole and saved with the adapter, such as a new head.
        target_parameters: parameters adapted by themselves, by their names or the ends of them,
            such as `experts.down_proj`; of three dimensions, the first is the experts'.
        trainable_token_indices: rows of the input embedding, or module -> rows of its table, that
            are trained and saved with the adapter; tied tables share them.
        layer_replication: ranges (start, end) of layers to put one after the other; repeated ones
            share the base's weights, not the adapter's.
        ensure_weight_tying: where a module that shares the input embedding's weight is adapted or
            trained whole, do the same to all that share it, with one set of weights.
        init_lora_weights: True (A uniform, B zero), "gaussian" (A normal, B zero), "orthogonal"
            or False (both random: for tests, since the adapter then changes the model from the
            start). By the base's weights: "pissa", "pissa_niter_N", "olora", "mica"; with a
            preprocessing of the model before: "corda", "lora_ga"; or of the adapted model after:
            "eva". "loftq" makes up for a quantisation.
        loftq_config: a `LoftQConfig`, or the dict of it, for "loftq".
        eva_config: an `EvaConfig`, for "eva".
        corda_config: a `CordaConfig`, for "corda".
        lora_ga_config: a `LoraGAConfig`, for "lora_ga".
        use_dora: DoRA: a trained magnitude for each output. Source: arXiv:2402.09353.
        alora_invocation_tokens: aLoRA: the tokens from whose last occurrence on the adapter acts.
            Source: arXiv:2504.12397.
        use_qalora: QA-LoRA: A sees the means of groups of features. Source: arXiv:2309.14717.
        qalora_group_size: features in such a group.
        velora_config: a `VeloraConfig`: inputs kept for the backward as projections.
        monteclora_config: a `MontecloraConfig`: samples around A are averaged while training.
        use_bdlora: a `BdLoraConfig`: block-diagonal factors.
        kasa_config: a `KasaConfig`: a learned diagonal over a truncated base.
        arrow_config: an `ArrowConfig`, for a router; set by `create_arrow_model`.
        target_parameters: ends of names of parameters to adapt, such as those that hold experts.
        trainable_token_indices: rows of the embedding to train, or a dict from names to rows.
        layer_replication: (first, last) of runs of layers to build a deeper model of.
        ensure_weight_tying: keep what is trained of tied weights tied.
        megatron_config: refused; it needs megatron-core.
        megatron_core: the module of it; without the field above it has no effect.
        runtime_config: a `LoraRuntimeConfig`, for this process only.
        task_type: what the model is for; it decides the facade and the heads that are trained.
        peft_type: LORA.
        auto_mapping: the class of the base model, where there is no task.
        peft_version: the release whose format the file has.
        base_model_name_or_path: where the base model is.
        revision: of the base model.
        inference_mode: whether the adapter is frozen when it is added.

    Raises:
        ConfigError: one error with everything that is wrong.
        UnsupportedFieldError: a field asks for a feature that is not supported.

    Source: LoRA, arXiv:2106.09685.
    """

    # Whether rows that are trained stand in a layer of their own rather than beside LoRA's.
    rows_alone: ClassVar[bool] = False

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: methods.LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: methods.EvaConfig | dict[str, Any] | None = None
    corda_config: methods.CordaConfig | dict[str, Any] | None = None
    lora_ga_config: methods.LoraGAConfig | dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: methods.VeloraConfig | dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: methods.MontecloraConfig | dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    # Not shown and not saved: it concerns this process only.
    runtime_config: methods.LoraRuntimeConfig | dict[str, Any] = field(
        default_factory=methods.LoraRuntimeConfig, repr=False
    )
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: methods.BdLoraConfig | dict[str, Any] | None = None
    arrow_config: methods.ArrowConfig | dict[str, Any] | None = None
    kasa_config: methods.KasaConfig | dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        for name in ("loftq_config", "rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        super().__post_init__()
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if self.modules_to_save is not None:
            self.modules_to_save = list(self.modules_to_save)
        self.rank_pattern = dict(self.rank_pattern)
        self.alpha_pattern = dict(self.alpha_pattern)
        settle_beginnings(self)

    def _settle(self) -> list[str]:
        self._refuse_unsupported()
        return self._build_methods()

    def _refuse_unsupported(self) -> None:
        asked = [name for name in NOT_SUPPORTED if not is_off(getattr(self, name))]
        if asked:
            raise UnsupportedFieldError(
                f"{len(asked)} field(s) ask for something that Lamina doesn't do yet.",
                faults=[f"{name}={getattr(self, name)!r}" for name in asked],
                cure="leave them at their defaults; they are refused rather than ignored",
            )

    # Modules that are adapted otherwise than by default: their class -> the layer's.
    layer_kinds: ClassVar[Mapping[type, type]] = MappingProxyType({})
    # The engine's layers -> their subclasses that are to be taken instead.
    instead: ClassVar[Mapping[type, type]] = MappingProxyType({})

    def _build_methods(self) -> list[str]:
        """Turn the dicts that a file holds into settings; a line for each value that is wrong."""
        if isinstance(self.loftq_config, methods.LoftQConfig):
            self.loftq_config = dict(vars(self.loftq_config))
        faults = []
        for name, kind in METHODS.items():
            value = getattr(self, name)
            if not isinstance(value, dict):
                if value is not None and not isinstance(value, kind):
                    faults.append(f"{name}={value!r}: a {kind.__name__} or a dict of its fields")
                continue
            try:
                setattr(self, name, _method(kind, value))
            except ConfigError as error:
                faults += [f"{name}: {fault}" for fault in error.faults]
        return faults

    def _faults(self) -> list[str]:
        return [
            *super()._faults(),
            *faults_of_numbers(self),
            *faults_of_choices(self),
            *faults_of_targets(self),
            *faults_of_beginnings(self),
        ]


def _method(kind: type[methods.MethodConfig], values: dict[str, Any]) -> methods.MethodConfig:
    """The settings that a dict describes, fields that are set later included."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    strange = [f"{name!r} is no setting of {kind.__name__}" for name in values.keys() - fields]
    if strange:
        raise ConfigError(f"This {kind.__name__} has unknown settings.", faults=strange)
    built = kind(**{name: value for name, value in values.items() if fields[name].init})
    for name, value in values.items():
        setattr(built, name, value)
    return built


PeftConfig._kinds[PeftType.LORA.value] = LoraConfig
