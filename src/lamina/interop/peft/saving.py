"""How the drop-in's facade saves: peft's files, with a model card."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lamina.checkpoint.adapter import write_adapter
from lamina.interop.peft import tensors
from lamina.interop.peft.beginnings import check_convertible
from lamina.interop.peft.constants import WEIGHTS_NAME
from lamina.model.saving import config_on_disk
from lamina.model.tasks import base_class
from lamina.storage.atomic import atomic_directory

_CARD = "README.md"


def save(
    model: Any,
    directory: Path,
    adapters: Iterable[str] | None,
    *,
    safe_serialization: bool,
    save_embedding_layers: str | bool,
    is_main_process: bool,
    initial: str | None,
    state_dict: dict[str, torch.Tensor] | None,
) -> None:
    """Write adapters: "default" at the root, others in folders; all of them or nothing.

    Raises:
        ValueError: the directory is a file, or an adapter isn't there.
        CheckpointError: the directory can't be written, or a tensor is not whole.
    """
    if directory.is_file():
        raise ValueError(f"Provided path ({directory}) should be a directory, not a file")
    names = list(model.peft_config) if adapters is None else list(adapters)
    if any(name not in model.peft_config for name in names):
        raise ValueError(
            "You passed an invalid `selected_adapters` arguments, current supported adapter names "
            f"are {list(model.peft_config)} - got {names}."
        )
    if not is_main_process:
        return
    if state_dict is None and "state_dict" in model.__dict__:
        # Who replaced the model's own method means what it gives.
        state_dict = model.state_dict()
    with atomic_directory(directory) as staging:
        if (directory / _CARD).is_file():
            shutil.copyfile(directory / _CARD, staging / _CARD)
        model.create_or_update_model_card(staging)
        for name in names:
            found = tensors.get_peft_model_state_dict(
                model,
                state_dict=state_dict,
                adapter_name=name,
                save_embedding_layers=save_embedding_layers,
            )
            config = _config(model, name)
            if initial is not None:
                config, found = _converted(model, name, initial, config, found)
            place = staging if name == "default" else staging / name
            _write(place, config, found, safe_serialization)


def _config(model: Any, name: str) -> Any:
    own = model.peft_config[name]
    base = model.get_base_model()
    if own.base_model_name_or_path is None:
        own.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    config = config_on_disk(model, name)
    if config.task_type is None:
        config.auto_mapping = base_class(base)
    return config


def _write(place: Path, config: Any, found: dict[str, torch.Tensor], safe: bool) -> None:
    write_adapter(place, config, found)
    if not safe:
        torch.save(found, place / WEIGHTS_NAME)
        (place / "adapter_model.safetensors").unlink()


def _converted(
    model: Any, name: str, initial: str, config: Any, found: dict[str, torch.Tensor]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The adapter as plain LoRA over the base as it was before an initialisation changed it."""
    check_convertible(config)
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.save_pretrained(initial)
    before = f"{Path(initial).name}_init"
    model.load_adapter(initial, before)
    try:
        start = tensors.get_peft_model_state_dict(model, adapter_name=before)
    finally:
        model.delete_adapter(before)
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.rank_pattern = {key: 2 * value for key, value in config.rank_pattern.items()}
    config.alpha_pattern = {key: 2 * value for key, value in config.alpha_pattern.items()}
    return config, {
        key: _joined(key, value, start[key]) if ".lora_" in key else value
        for key, value in found.items()
    }


def _joined(key: str, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`B1 A1 - B0 A0 = [B1, -B0] [A1; A0]`."""
    before = before.to(now)
    if ".lora_B" in key or "embedding_B" in key:
        return torch.cat([now, -before], dim=1)
    return torch.cat([now, before], dim=0)
