"""Configs, and their form on disk; nothing here knows torch."""

from lamina.config.adalora import AdaLoraConfig
from lamina.config.base import CONFIG_NAME, FORMAT_VERSION, PeftConfig, PeftType, TaskType
from lamina.config.lora import ALL_LINEAR, LoraConfig
from lamina.config.methods import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from lamina.config.patterns import numbers

__all__ = [
    "ALL_LINEAR",
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "AdaLoraConfig",
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "VeloraConfig",
    "numbers",
]
