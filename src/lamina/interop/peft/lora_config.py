"""`LoraConfig` as peft has it: it judges its values late, when a model is adapted."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from lamina import config as native
from lamina.config import checks
from lamina.config.lora import METHODS
from lamina.errors import ConfigError
from lamina.interop.peft.config import PeftConfig
from lamina.interop.peft.kinds import STANDING
from lamina.interop.peft.types import PeftType

_DATA_DRIVEN = ("olora", "corda", "lora_ga")


@dataclass
class LoraConfig(native.LoraConfig, PeftConfig):
    """Lamina's `LoraConfig`, as lenient as peft's."""

    stands_for: ClassVar[Any] = native.LoraConfig
    instead: ClassVar[Any] = STANDING

    def __post_init__(self) -> None:
        self._check_task()
        self._refuse_strange_types()
        self._refuse_contradictions()
        self._warn_of_task()
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self._warn_of_conversion()

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """Adapt modules of these classes by these layers; it isn't saved."""
        # The class has none; a config's own are no field, since files can't hold them.
        self.__dict__["layer_kinds"] = {**self.layer_kinds, **mapping}

    def _wrong_types(self) -> dict[str, str]:
        return {}

    def _faults(self) -> list[str]:
        return []

    def _refuse_unsupported(self) -> None:
        """Not yet: a config may be read and written by who doesn't apply it."""

    def refuse_unsupported(self) -> None:
        """Refuse what Lamina doesn't do.

        Raises:
            UnsupportedFieldError: a field asks for it.
        """
        native.LoraConfig._refuse_unsupported(self)

    def late_faults(self) -> list[str]:
        """What is wrong with the values, once a model is to be adapted by them."""
        rank = self.r
        if not isinstance(rank, int) or rank <= 0:
            return [f"`r` should be a positive integer value but the value passed is {rank}"]
        return [*checks.faults_of_numbers(self), *checks.faults_of_choices(self)]

    def _refuse_strange_types(self) -> None:
        for name, kind in METHODS.items():
            if not isinstance(getattr(self, name), (kind, dict, type(None))):
                known = kind.__name__
                raise TypeError(f"`{known}` must be a `{known}`, a dict, or None.")

    def _refuse_contradictions(self) -> None:
        by_regex = isinstance(self.target_modules, str)
        for name in ("layers_to_transform", "layers_pattern"):
            if by_regex and getattr(self, name) is not None:
                raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
            )
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ConfigError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or "
                f"False, got init_lora_weights={self.init_lora_weights} instead."
            )
        if self.lora_bias and self.use_dora:
            raise ConfigError(
                "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False"
            )
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.init_lora_weights == "loftq" and not self.loftq_config:
            raise ConfigError(
                "`loftq_config` must be specified when `init_lora_weights` is 'loftq'."
            )

    def _warn_of_task(self) -> None:
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            _warn("aLoRA is currently only supported for CAUSAL_LM task.")

    def _warn_of_conversion(self) -> None:
        init = self.init_lora_weights
        driven = init in _DATA_DRIVEN or (isinstance(init, str) and init.startswith("pissa"))
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern) and driven:
            _warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training "
                "conversion of modified base weights PiSSA/CorDA/OLoRA/LoRA-GA means that you "
                "won't be able to pass `path_initial_model_for_weight_conversion` to "
                "`save_pretrained` to restore the initial values of the base weights."
            )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)
