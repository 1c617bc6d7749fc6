"""A base without its weights: its files, and the model on the meta device, as they name tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.origin import PREFIX, plain_key
from lamina.checkpoint.record import StageRecord
from lamina.checkpoint.sketch import FileWeights, compare
from lamina.checkpoint.stream.files import INDEX, ModelFiles, Reader, Stored, model_files
from lamina.checkpoint.stream.names import Naming, naming
from lamina.engine.names import places
from lamina.engine.ties import sharing
from lamina.errors import MissingFileError, StageError
from lamina.model import AutoPeftModel
from lamina.stages.bases import base_faults, base_remarks, describe_base
from lamina.stages.likeness import over, tell, updates_in_file
from lamina.stages.tokenizers import tokenizer_faults, tokenizer_remarks, with_tokenizer


class NotStreamable(Exception):
    """Why a merge has to be done in memory."""


def directory_of(file: AdapterFile, hub: Mapping[str, Any]) -> Path:
    """Where the base's files are on this disk."""
    name = file.config.base_model_name_or_path
    if not name:
        # Loading it says so, and what to do.
        raise NotStreamable("the adapter doesn't name its base")
    place = Path(name).expanduser()
    if place.is_dir():
        return place
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(
            name, "config.json", revision=file.config.revision, cache_dir=hub.get("cache_dir")
        )
    except ValueError:
        # What isn't a hub id.
        found = None
    if not isinstance(found, str):
        raise NotStreamable("the base isn't on this disk")
    return Path(found).parent


def files_of(base: Path) -> ModelFiles:
    """Its weights, by their headers."""
    try:
        return model_files(base)
    except MissingFileError as error:
        if (base / INDEX).is_file() and not str(base.parent).endswith("snapshots"):
            raise
        raise NotStreamable(f"the base has no safetensors files ({error.what})") from error


def skeleton_of(file: AdapterFile, base: Path, files: ModelFiles) -> tuple[Any, dict[str, Any]]:
    """(the model without weights, its config as a dict)."""
    from transformers import AutoConfig

    loader: Any = AutoPeftModel.base_class(file.config)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise NotStreamable("the base is stored quantised")
        build = getattr(loader, "from_config", None) or loader._from_config
        with torch.device("meta"):
            model = build(config, dtype=_dtype(files))
    except NotStreamable:
        raise
    except Exception as error:
        # A config that is none makes transformers raise whatever it likes.
        said = str(error).strip().partition("\n")[0]
        raise NotStreamable(f"the model can't be built from its config alone ({said})") from error
    architectures = getattr(config, "architectures", None) or []
    if type(model).__name__ not in architectures:
        told = " or ".join(map(str, architectures)) or "model of unknown class"
        raise NotStreamable(
            f"the base is a {told}, and the adapter is for a {type(model).__name__}"
        )
    model.name_or_path = str(file.config.base_model_name_or_path)
    return model, model.config.to_dict()


def _dtype(files: ModelFiles) -> torch.dtype:
    """That of most entries."""
    counts = Counter[torch.dtype]()
    for stored in files.tensors.values():
        if stored.is_dense:
            counts[stored.torch_dtype] += prod(stored.shape)
    if not counts:
        raise NotStreamable("the base's weights are not floating-point numbers")
    return counts.most_common(1)[0][0]


def named(model: Any, files: ModelFiles) -> Naming:
    """How files and model name tensors."""
    shapes = {key: stored.shape for key, stored in files.tensors.items()}
    try:
        return naming(model, shapes)
    except (ImportError, AttributeError, TypeError) as error:
        # These parts of transformers move from release to release.
        raise NotStreamable(
            f"this transformers doesn't tell how it names tensors ({error})"
        ) from error


def _stored(names: Naming, files: ModelFiles) -> dict[str, Stored]:
    """Name in the model -> where it is, for what isn't fused."""
    return {u.names[0]: files.tensors[u.keys[0]] for u in names.units if u.load is None}


def brought(
    model: nn.Module, file: AdapterFile, names: Naming, files: ModelFiles, reader: Reader
) -> set[str]:
    """Fill what loading the adapter will write into: biases, and weights that it brings along."""
    stored = _stored(names, files)
    plain = {
        plain_key(key).removeprefix(PREFIX).replace(".base_layer.", ".") for key in file.tensors
    }
    biased = file.config.bias != "none" or file.config.lora_bias
    wanted = {
        name for name in stored if name in plain or (biased and name.rpartition(".")[2] == "bias")
    }
    for name in wanted:
        path, _, leaf = name.rpartition(".")
        holder = model.get_submodule(path)
        before = holder._parameters.get(leaf)
        if before is None or tuple(before.shape) != stored[name].shape:
            continue
        _put(model, before, nn.Parameter(reader.read(stored[name]), before.requires_grad))
    return wanted


def _put(model: nn.Module, before: nn.Parameter, now: nn.Parameter) -> None:
    """Replace a parameter wherever it is held."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is before:
                module._parameters[leaf] = now


def untie_unequal(model: Any, names: Naming, files: ModelFiles, reader: Reader) -> None:
    """As transformers does: what the config ties, but the files have twice and unequal, isn't."""
    stored = _stored(names, files)
    for group in sharing(places(model)):
        there = [p for p in group if f"{p.name}.weight" in stored]
        for place in there[1:]:
            one, other = stored[f"{there[0].name}.weight"], stored[f"{place.name}.weight"]
            if not _equal(one, other, reader):
                weight: Any = place.original.weight
                place.original._parameters["weight"] = nn.Parameter(
                    weight.detach().clone(), weight.requires_grad
                )


def _equal(one: Stored, other: Stored, reader: Reader, rows: int = 4096) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    for begin in range(0, one.shape[0], rows):
        part = slice(begin, min(begin + rows, one.shape[0]))
        if not torch.equal(reader.read(one, part), reader.read(other, part)):
            return False
    return True


def check_base(
    record: StageRecord, model: nn.Module, file: AdapterFile, tokenizer: Any, weights: FileWeights
) -> None:
    """As `lamina.load` does, but for reading the weights from the files."""
    recorded, before = record.newest.base, with_tokenizer(record)
    likeness = None
    if recorded.sketch is not None:
        likeness = compare(
            recorded.sketch,
            weights,
            over(record, lambda: updates_in_file(file)),
            name=recorded.name_or_path,
            here=getattr(model, "name_or_path", None),
        )
    faults = [
        *base_faults(recorded, describe_base(model), likeness),
        *tokenizer_faults(before, tokenizer),
    ]
    if faults:
        raise StageError(
            f"{file.source} was trained on another base.",
            faults=faults,
            cure="merge it into its own base, or pass allow_base_mismatch=True "
            "(--allow-base-mismatch) to go on with this one",
        )
    tell(file.source, [*base_remarks(likeness), *tokenizer_remarks(before, tokenizer)], 5)
