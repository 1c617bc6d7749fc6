"""What an export has to know of the base, wherever that is: its config, and its own tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lamina.checkpoint.export.base_config import BaseConfig, base_config, read_base_config
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.export.target import Target
from lamina.checkpoint.export.updates import read_updates
from lamina.checkpoint.origin import PREFIX
from lamina.checkpoint.record import read_record
from lamina.checkpoint.weights import WeightsOnDisk
from lamina.errors import CheckpointError, ExportError

AnyBase: TypeAlias = nn.Module | str | Path | BaseConfig


def config_of_base(base: AnyBase | None, contents: Contents, target: Target) -> BaseConfig | None:
    """The config of the base that was given, else of the one on record; None if it isn't to be had.

    A recorded hub id is only asked for where the target can't do without.
    """
    if isinstance(base, BaseConfig):
        return base
    if isinstance(base, nn.Module):
        config = getattr(base, "config", None)
        if config is None:
            return None
        name = getattr(config, "name_or_path", None) or type(base).__name__
        return base_config(config, type(base).__name__, source=name)
    if base is not None:
        return read_base_config(str(base))
    recorded = _recorded_base(contents)
    if recorded is None or not (target.needs_base or Path(recorded).is_dir()):
        return None
    try:
        return read_base_config(recorded)
    except ExportError:
        return None


def _recorded_base(contents: Contents) -> str | None:
    record = read_record(contents.metadata, source=contents.source)
    told = record.newest.base.name_or_path if record else None
    named = told or contents.config.get("base_model_name_or_path")
    return named if isinstance(named, str) else None


def without_base_copies(
    contents: Contents, path: str | Path, base: AnyBase | None, where: dict[str, Any]
) -> Contents:
    """The contents without values beside the factors that are the base's own, told by comparing."""
    known = _weights(base) if contents.base_weights else {}
    if not known:
        return contents
    tensors = read_updates(path, contents, **where).others
    own = {
        key
        for key in contents.base_weights
        if _is_base(tensors[key], known, key.removeprefix(PREFIX).replace(".base_layer.", "."))
    }
    return replace(contents, base_weights=tuple(k for k in contents.base_weights if k not in own))


def _weights(base: AnyBase | None) -> Mapping[str, torch.Tensor]:
    """Name -> tensor of a base in memory or in a local directory; nothing of any other."""
    if base is None:
        return {}
    if isinstance(base, nn.Module):
        return base.state_dict()
    try:
        return WeightsOnDisk(base.source if isinstance(base, BaseConfig) else base)
    except CheckpointError:
        return {}


def _is_base(tensor: torch.Tensor, known: Mapping[str, torch.Tensor], name: str) -> bool:
    if name not in known:
        return False
    mine = known[name].to(tensor.device)
    return mine.shape == tensor.shape and torch.equal(mine.to(tensor.dtype), tensor)
