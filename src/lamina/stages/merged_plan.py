"""Plan a merge tensor by tensor, by headers and a model on the meta device; nothing is written."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from lamina._version import __version__
from lamina.checkpoint.adapter import AdapterFile, read_adapter
from lamina.checkpoint.record import StageRecord
from lamina.checkpoint.sketch import FileWeights
from lamina.checkpoint.stream.changes import Changes, changes_of
from lamina.checkpoint.stream.files import ModelFiles, Reader
from lamina.checkpoint.stream.names import Naming
from lamina.checkpoint.stream.plan import Plan, plan_of
from lamina.engine.fold import not_foldable
from lamina.engine.names import places
from lamina.engine.ties import sharing
from lamina.model import PeftModel, loading
from lamina.model.vocabulary import grown
from lamina.stages.configs import refuse_edited_config
from lamina.stages.merged_files import files_beside, refuse_sources
from lamina.stages.merged_in_memory import Request
from lamina.stages.merged_skeleton import (
    NotStreamable,
    brought,
    check_base,
    directory_of,
    files_of,
    named,
    skeleton_of,
    untie_unequal,
)
from lamina.storage.source import find_adapter

# Of `lamina.load`: all else is for loading the base.
_KNOWN = (*loading.HUB_OPTIONS, "allow_base_mismatch", "tokenizer")


@dataclass(frozen=True)
class Prepared:
    """A merge that is about to be written.

    Attributes:
        asked: what was asked for.
        file: the adapter.
        record: its chain.
        base: the base's directory.
        files: its weights.
        naming: how they and the model name tensors.
        changes: what becomes of the model's.
        plan: what is written.
        model_class: of the model.
        parameters: entries of its weights.
        config: places in `config.json` that get other values.
        adapter_directory: where the adapter lies.
        identity: what tells this merge from others.
        began: when, for `time.monotonic`.
    """

    asked: Request
    file: AdapterFile
    record: StageRecord
    base: Path
    files: ModelFiles
    naming: Naming
    changes: Changes
    plan: Plan
    model_class: str
    parameters: int
    config: dict[tuple[str, ...], Any]
    adapter_directory: Path
    identity: dict[str, Any]
    began: float


def prepare(asked: Request) -> Prepared:
    """Read the headers, build the model on the meta device, and plan; nothing is written.

    Raises:
        NotStreamable: it has to be done in memory, and why.
        LaminaError: it can't be done at all.
    """
    began = time.monotonic()
    others = [name for name in asked.options if name not in _KNOWN]
    if others:
        raise NotStreamable(f"{', '.join(others)} is for loading the base")
    hub = {name: asked.options[name] for name in loading.HUB_OPTIONS if name in asked.options}
    file = read_adapter(asked.path, **hub)
    record = file.record()
    refuse_edited_config(file, record)
    if asked.base is not None:
        file.config.base_model_name_or_path, file.config.revision = asked.base, None
    base = directory_of(file, hub)
    refuse_sources(asked.place, [str(base)])
    files = files_of(base)
    model, before = skeleton_of(file, base, files)
    names = named(model, files)
    with Reader(base) as reader:
        given = brought(model, file, names, files, reader)
        untie_unequal(model, names, files, reader)
    with grown(model, file):
        if not asked.options.get("allow_base_mismatch", False):
            plain = {unit.keys[0]: unit.names[0] for unit in names.units if unit.load is None}
            weights = FileWeights(base, lambda _: plain)
            check_base(record, model, file, asked.options.get("tokenizer"), weights)
        parameters = sum(p.numel() for p in model.parameters())
        kind = PeftModel.for_task(file.config.task_type)
        facade = loading.over(kind, model, file, loading.How(), record.newest.name).eval()
    changes = _changes(facade, record.newest.name, given)
    plan = plan_of(files, names, changes, asked.dtype)
    if plan.faults:
        raise NotStreamable(_told(plan.faults))
    config = _config(facade.get_base_model(), changes, before, asked.dtype, base)
    found = find_adapter(asked.path, **hub)
    # What can't be copied is told now.
    files_beside(base, found.config.parent)
    more = sum(prod(o.place.shape) for task in plan.tasks for o in task.outputs if not o.source)
    return Prepared(
        asked=asked,
        file=file,
        record=record,
        base=base,
        files=files,
        naming=names,
        changes=changes,
        plan=plan,
        model_class=type(model).__name__,
        parameters=parameters + more,
        config=config,
        adapter_directory=found.config.parent,
        identity=_identity(files, (found.config, *found.weights), asked, config),
        began=began,
    )


def _told(faults: tuple[str, ...]) -> str:
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return faults[0] + more


def _changes(facade: PeftModel, adapter: str, given: set[str]) -> Changes:
    state, root = facade.adapter_state, facade.get_base_model()
    if state.replication is not None:
        raise NotStreamable("the adapter replicates layers")
    changes = changes_of(root, adapter, state, given)
    if changes.refused:
        tied = bool(sharing(places(root)))
        raise not_foldable(changes.refused, changes.layers, tied=tied)
    return changes


def _config(
    model: Any, changes: Changes, before: dict[str, Any], dtype: torch.dtype | None, base: Path
) -> dict[tuple[str, ...], Any]:
    """Where `config.json` has to be another than the base's: vocabulary, ties, dtype."""
    after = model.config.to_dict()
    changed = {
        way: value
        for way, value in _differences(before, after)
        if way[-1] in ("vocab_size", "tie_word_embeddings")
    }
    if before.get("tie_word_embeddings") and _untied(model, changes):
        changed[("tie_word_embeddings",)] = False
    written = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        name = "torch_dtype" if "torch_dtype" in written and "dtype" not in written else "dtype"
        changed[(name,)] = str(dtype).removeprefix("torch.")
    return changed


def _differences(
    one: dict[str, Any], other: dict[str, Any], way: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(one.get(key), dict):
            yield from _differences(one[key], value, (*way, key))
        elif one.get(key) != value:
            yield (*way, key), value


def _untied(model: Any, changes: Changes) -> bool:
    """Whether embedding and head were one tensor, and are two now."""
    tables = [getattr(model, f"get_{side}_embeddings")() for side in ("input", "output")]
    by_module = {}
    for place in places(model):
        by_module[id(place.module)] = by_module[id(place.original)] = f"{place.name}.weight"
    found = [by_module.get(id(table)) for table in tables]
    if None in found or any(name not in changes.before for name in found):
        return False
    first, last = (str(name) for name in found)
    was = changes.before[first] == changes.before[last]
    return was and changes.values[first].identity != changes.values[last].identity


def _identity(
    files: ModelFiles, adapter: tuple[Path, ...], asked: Request, config: Mapping[Any, Any]
) -> dict[str, Any]:
    """What has to be the same for a merge to go on where another one stopped."""
    return {
        "lamina": __version__,
        "torch": torch.__version__,
        "base": state_of(files),
        "adapter": [_digest(path) for path in adapter],
        "dtype": str(asked.dtype),
        "config": repr(sorted(config.items())),
    }


def state_of(files: ModelFiles) -> dict[str, Any]:
    """What tells whether files were changed."""
    stats = {name: (files.directory / name).stat() for name in files.names}
    return {
        name: [stats[name].st_size, stats[name].st_mtime_ns, files.headers[name]]
        for name in files.names
    }


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(2**20):
            found.update(chunk)
    return found.hexdigest()
