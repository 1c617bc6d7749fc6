"""AdaLoRA as peft has it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamina import config as native
from lamina.engine import layers
from lamina.engine.allocation import RankAllocator
from lamina.errors import AllocationError
from lamina.interop.peft import constants
from lamina.interop.peft.lora_config import LoraConfig
from lamina.interop.peft.standing import StandsFor
from lamina.interop.peft.tuner import LoraModel
from lamina.interop.peft.types import PeftType
from lamina.model import adalora

__all__ = [
    "AdaLoraConfig",
    "AdaLoraLayer",
    "AdaLoraModel",
    "RankAllocator",
    "SVDConv2d",
    "SVDLinear",
    "SVDQuantLinear",
]


@dataclass
class AdaLoraConfig(native.AdaLoraConfig, LoraConfig):
    """Lamina's `AdaLoraConfig`, as lenient as peft's."""

    stands_for: ClassVar[Any] = native.AdaLoraConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA

    def _faults_of_methods(self) -> list[str]:
        # What else AdaLoRA hasn't, peft ignores.
        refused = ("ADALORA does not support",)
        return [fault for fault in super()._faults_of_methods() if fault.startswith(refused)]

    def _faults_of_allocation(self) -> list[str]:
        return [f for f in super()._faults_of_allocation() if f.startswith("`orth_reg_weight`")]

    def late_faults(self) -> list[str]:
        """What is wrong with the values, once a model is to be adapted by them."""
        # The pattern is of masks here, not of ranks.
        plain = copy.copy(self)
        plain.rank_pattern = None
        if plain.bias == "adalora_only":
            plain.bias = "lora_only"
        return [*LoraConfig.late_faults(plain), *native.AdaLoraConfig._faults_of_allocation(self)]


class AdaLoraModel(adalora.SharesRanks, LoraModel):
    """A model with AdaLoRA adapters, by peft's methods and with its leniency."""

    stands_for: Any = adalora.AdaLoraModel
    target_module_mapping = constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, config: Any = None, **options: Any
    ) -> None:
        """Add an adapter; it is not active yet. One of them may train.

        Raises:
            AllocationError: another one trains already.
        """
        config = self.peft_config[adapter_name] if config is None else config
        others = {n: c for n, c in self.peft_config.items() if n != adapter_name}
        if not config.inference_mode and not all(c.inference_mode for c in others.values()):
            raise AllocationError(
                f"{type(self).__name__} supports only 1 trainable adapter.",
                cure="set inference_mode=True in the configs of all others",
            )
        super().inject_adapter(model, adapter_name, *args, config=config, **options)
        if not config.inference_mode:
            self.begin_allocation(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter can be turned into LoRA; peft says no, `convert_to_lora` can."""
        return False


class AdaLoraLayer(metaclass=StandsFor):
    """Every layer that AdaLoRA adapts is an instance of this."""

    stands_for = layers.SvdLayer


class SVDLinear(metaclass=StandsFor):
    """A linear layer that AdaLoRA adapts."""

    stands_for = layers.SvdLinear


class SVDConv2d(metaclass=StandsFor):
    """A convolution that AdaLoRA adapts."""

    stands_for = layers.SvdConv2d


class SVDQuantLinear(metaclass=StandsFor):
    """In Lamina one class serves all linear layers, quantised or not."""

    stands_for = layers.SvdLinear
