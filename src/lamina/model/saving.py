"""How the facade saves: collect the tensors of each adapter, write the directory at once."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lamina.checkpoint.adapter import write_adapter
from lamina.checkpoint.keys import slots, taken
from lamina.checkpoint.ranks import without_lost_ranks
from lamina.checkpoint.written import check_whole
from lamina.config import ALL_LINEAR, AdaLoraConfig, LoraConfig
from lamina.engine.allocation import without_adapter
from lamina.engine.layers import ModulesToSaveWrapper, lora_layers
from lamina.engine.layers.linear import store_in_by_out
from lamina.engine.names import places
from lamina.engine.targets import spell, spell_saved
from lamina.errors import CheckpointError
from lamina.model.original import on_original_base
from lamina.model.vocabulary import vocabulary_entry
from lamina.storage.atomic import atomic_directory

if TYPE_CHECKING:
    from lamina.model.facade import PeftModel


def save(
    model: PeftModel,
    directory: Path,
    adapters: Iterable[str] | None,
    state_dict: dict[str, torch.Tensor] | None = None,
    safe_serialization: bool = True,
) -> None:
    """Write adapters in PEFT's layout: "default" at the root, others in folders.

    They are written for the base as it was, whatever their initialisation has changed in it.
    """
    if not safe_serialization:
        raise CheckpointError(
            "Weights are written as safetensors only: opening a pickle can run code.",
            cure="leave safe_serialization at True",
        )
    checkpoints = getattr(model.stage, "checkpoints", None)
    if checkpoints is not None and adapters is None:
        checkpoints.save(model, directory)
        return
    names = model.adapter_state.check_known(model.peft_config if adapters is None else adapters)
    ready = [
        (
            name,
            *on_original_base(
                model, name, config_on_disk(model, name), adapter_tensors(model, name, state_dict)
            ),
        )
        for name in names
    ]
    with atomic_directory(directory) as staging:
        for name, config, tensors in ready:
            where = staging if name == "default" else staging / name
            write_adapter(where, config, tensors, vocabulary_entry(model.get_base_model(), config))


def adapter_tensors(
    model: PeftModel, name: str, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Name on disk -> tensor, for one adapter.

    Raises:
        CheckpointError: `state_dict` was given and lacks some of them, or some are not whole.
    """
    found = slots(model, name, model.adapter_state, alone=True)
    config = model.peft_config[name]
    if state_dict is None:
        own = {key: slot.tensor.detach() for key, slot in found.items()}
        check_whole(own)
        return without_lost_ranks(own, found, config)
    given = taken(found, name, state_dict)
    missing = sorted(found.keys() - given.keys())
    if missing:
        raise CheckpointError(
            f"The state dict lacks {len(missing)} of the {len(found)} tensors of {name!r}.",
            faults=missing[:6],
            cure="gather all parameters before saving, or leave state_dict out",
        )
    check_whole(given)
    return without_lost_ranks(given, found, config)


def config_on_disk(model: PeftModel, name: str) -> LoraConfig:
    """An adapter's config as it is written: for inference, and exact for every reader.

    "all-linear" is written out as the names it meant, and endings that mean more to other readers
    are, as whole names.
    """
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    if isinstance(config, AdaLoraConfig) and config.rank_pattern:
        config.rank_pattern = without_adapter(config.rank_pattern, name)
    base = model.get_base_model()
    layers = [layer for _, layer in lora_layers(base) if name in layer.records]
    config.fan_in_fan_out = store_in_by_out(layers)
    everything = list(places(base))
    whole = {
        place.name
        for place in everything
        if isinstance(place.module, ModulesToSaveWrapper) and name in place.module.modules_to_save
    }
    endings = tuple(config.modules_to_save or ())
    if any(place.name.endswith(endings) for place in everything if place.name not in whole):
        config.modules_to_save = spell_saved(everything, whole) or None
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        inside = {id(layer) for layer in layers}
        config.target_modules = set(
            spell(everything, {p.name for p in everything if id(p.module) in inside})
        )
    return config
