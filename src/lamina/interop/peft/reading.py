"""How the drop-in's facade loads: leniently, and over what is there."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from lamina.checkpoint.load import fill_adapter
from lamina.interop.peft import registry
from lamina.interop.peft.config import PeftConfig
from lamina.interop.peft.experts import fuse_tensors
from lamina.interop.peft.tensors import (
    LoadResult,
    load_peft_weights,
    load_result,
    warn_mismatched,
)
from lamina.model import replacing
from lamina.model.checkpointing import is_checkpointing

_CONFIG_OPTIONS = (
    "subfolder",
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
)


def split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of a download, all others)."""
    from huggingface_hub import hf_hub_download

    known = inspect.signature(hf_hub_download).parameters
    hub = {name: value for name, value in kwargs.items() if name in known}
    return hub, {name: value for name, value in kwargs.items() if name not in known}


def config_for(model_id: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """The given config, or the one on disk.

    Raises:
        ValueError: what was given is no config, or there is none on disk.
    """
    if config is not None:
        if not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
        return config
    where = {name: kwargs[name] for name in _CONFIG_OPTIONS if kwargs.get(name) is not None}
    kind = PeftConfig._get_peft_type(model_id, **where)
    return registry.PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(model_id, **where)


def overwrite(
    model: Any,
    model_id: Any,
    adapter: str,
    device: str | None,
    key_mapping: dict[str, str] | None,
    kwargs: dict[str, Any],
) -> LoadResult:
    """Put the tensors on disk into an adapter that is there."""
    where = {name: kwargs[name] for name in _CONFIG_OPTIONS if kwargs.get(name) is not None}
    tensors = load_peft_weights(model_id, device=device, key_mapping=key_mapping, **where)
    report = fill_adapter(
        model,
        adapter,
        model.adapter_state,
        fuse_tensors(model, tensors),
        strict=False,
        ignore_mismatched_sizes=bool(kwargs.get("ignore_mismatched_sizes")),
        source=str(model_id),
    )
    warn_mismatched(report, type(model).__name__)
    return load_result(report, adapter)


def refuse_other_config(model: Any, model_id: Any, adapter: str, kwargs: dict[str, Any]) -> None:
    """Keep weights out of an adapter whose config, such as its alpha, they were not trained under.

    Raises:
        ConfigError: with every field that differs.
    """
    own = model.peft_config[adapter]
    try:
        found = config_for(model_id, kwargs.get("config"), kwargs)
    except ValueError:
        # Weights alone.
        return
    if found is not own and found.peft_type == own.peft_type == "LORA":
        replacing.refuse_other_config(model, adapter, found, str(model_id))


def warn_missing(result: LoadResult, adapter: str, config: Any) -> None:
    """Warn of weights that no tensor has filled."""
    if not result.missing_keys:
        return
    text = f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}."
    prefix = registry.PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
    if prefix and adapter in prefix:
        text = (
            f"Adapter name '{adapter}' should not be contained in the prefix '{prefix}'. This "
            f"could be the potential reason for missing adapter keys. {text}"
        )
    warnings.warn(text, stacklevel=3)


def recomputes(model: Any) -> bool:
    """Whether a model recomputes activations, or doesn't say, as peft takes it."""
    named = ("is_gradient_checkpointing", "is_activation_checkpointing")
    if any(hasattr(type(model), name) for name in named):
        return is_checkpointing(model)
    return True
