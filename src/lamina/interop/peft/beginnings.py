"""Adapters that changed the base when they began: what peft says of them, and of converting."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from lamina.engine.layers import lora_layers
from lamina.errors import CheckpointError
from lamina.interop.peft.types import PeftWarning

_SPOKEN = {"pissa": "PiSSA", "corda": "CorDA", "olora": "OLoRA"}
_CONVERTIBLE = ("pissa", "corda", "olora", "lora_ga", "true")


def warn_of_changed_base(configs: Iterable[Any]) -> None:
    """Warn if one of several adapters changed the base that the others lie over."""
    inits = [getattr(config, "init_lora_weights", None) for config in configs]
    found = next((init for init in _SPOKEN if init in inits), None)
    if found is not None and len(inits) > 1:
        warnings.warn(
            f"{_SPOKEN[found]} changes the base weights of the model and should thus not be used "
            f"with other adapters. Consider converting the {_SPOKEN[found]} adapter into a normal "
            "LoRA adapter: save_pretrained(path, path_initial_model_for_weight_conversion=...)",
            stacklevel=4,
        )


def check_convertible(config: Any) -> None:
    """Refuse an adapter whose scalings its file would not say.

    Raises:
        CheckpointError: with `use_rslora` and patterns at once.
    """
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise CheckpointError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not "
            "supported when using `rank_pattern` or `alpha_pattern` at the same time as "
            "`use_rslora=True`."
        )
    if not str(config.init_lora_weights).lower().startswith(_CONVERTIBLE):
        warnings.warn(
            "`path_initial_model_for_weight_conversion` only works for converting a "
            "PiSSA/CorDA/OLoRA/LoRA-GA adapter to a LoRA adapter",
            stacklevel=4,
        )


def refuse_unknown_bias(bias: str) -> None:
    """Refuse a choice of biases that there isn't.

    Raises:
        NotImplementedError: as in peft.
    """
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise NotImplementedError(
            f"Requested bias: {bias}, is not implemented; there are 'none', 'all' and 'lora_only'."
        )


def warn_of_missing_bias(model: nn.Module, adapter: str) -> None:
    """Warn if B has a bias in a layer whose base has none that could take it up."""
    for _, layer in lora_layers(model):
        record, base = layer.records.get(adapter), layer.base_layer
        if record is not None and record.lora_bias and getattr(base, "bias", None) is None:
            warnings.warn(
                "`lora_bias=True` was passed but the targeted layer of type "
                f"{type(base).__name__} has no bias. This means that merging LoRA weights won't "
                "be possible.",
                PeftWarning,
                stacklevel=4,
            )
