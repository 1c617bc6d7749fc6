"""The two files of a PEFT adapter with plain factors: what vLLM and every release of PEFT open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lamina.checkpoint.adapter import WEIGHTS_NAME
from lamina.checkpoint.digest import tensors_digest
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.origin import A_LEAVES, B_LEAVES, PREFIX
from lamina.checkpoint.record import KEY, read_record
from lamina.config import CONFIG_NAME
from lamina.engine.compose import Factors

# How the modules were chosen; kept as they are, whatever else is written.
_SELECTION = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "modules_to_save",
    "fan_in_fan_out",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
)


def plain_config(contents: Contents, ranks: Mapping[str, int], scaling: float) -> dict[str, Any]:
    """An `adapter_config.json` with one scaling everywhere, and no field that says nothing.

    `r` is the largest rank, by which some readers allocate; `lora_alpha / r` is `scaling` for
    those that take the global one only.

    Args:
        contents: of the adapter that is written anew.
        ranks: name of a module or parameter -> its rank in the new file.
        scaling: of all of them.
    """
    rank = max(ranks.values())
    smaller = {name: each for name, each in sorted(ranks.items()) if each != rank}
    chosen = {name: contents.config.get(name) for name in _SELECTION}
    return {
        **{name: value for name, value in chosen.items() if value not in (None, [], {})},
        "peft_type": "LORA",
        # vLLM stops where the field isn't there, whatever it says.
        "target_modules": chosen["target_modules"],
        "r": rank,
        "lora_alpha": tidy(scaling * rank),
        "rank_pattern": smaller,
        "alpha_pattern": {name: tidy(scaling * each) for name, each in smaller.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(contents.config.get("fan_in_fan_out")),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def tidy(value: float) -> float:
    """A whole number as such, as configs have it."""
    return int(value) if value == int(value) else value


def write_peft(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write both files, names and fields sorted."""
    save_file(
        {name: tensors[name].contiguous().clone() for name in sorted(tensors)},
        directory / WEIGHTS_NAME,
        metadata={"format": "pt", **metadata},
    )
    text = json.dumps(dict(sorted(config.items())), indent=2, ensure_ascii=False)
    (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def factor_tensors(contents: Contents, factors: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """Name on disk -> A or B."""
    tensors = {}
    for each in contents.factors:
        place = 1 if contents.is_embedding(each) else 0
        tensors[f"{PREFIX}{each.module}.{A_LEAVES[place]}"] = factors[each.module].A
        tensors[f"{PREFIX}{each.module}.{B_LEAVES[place]}"] = factors[each.module].B
    return tensors


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors that were written."""
    return dict(load_file(directory / WEIGHTS_NAME))


def read_config(directory: Path) -> dict[str, Any]:
    """The config that was written."""
    values: dict[str, Any] = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    return values


def metadata_for(
    contents: Contents,
    tensors: Mapping[str, torch.Tensor] | None,
    *,
    keep: bool,
    rounded: bool = False,
) -> dict[str, str]:
    """The strings for the header: those of the file, or none.

    Args:
        contents: the adapter's.
        tensors: what is written under PEFT's names, so that the record can tell it by its digest;
            None where the format has other names.
        keep: whether the stage record goes along.
        rounded: whether numbers were rounded to a narrower dtype, so that the recorded answers no
            longer hold.
    """
    if not keep:
        return {}
    strings = {name: text for name, text in contents.metadata.items() if name != "format"}
    record = read_record(strings, source=contents.source)
    if record is not None:
        digest = None if tensors is None or record.weights is None else tensors_digest(tensors)
        stages = record.stages
        if rounded:
            stages = (*stages[:-1], record.newest.model_copy(update={"probe": None}))
        update = {"weights": digest, "stages": stages}
        strings[KEY] = record.model_copy(update=update).to_metadata()[KEY]
    return strings
