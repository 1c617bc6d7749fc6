"""Merge tensor by tensor: plan on the meta device, then read, fold and write."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina._version import __version__
from lamina.checkpoint.adapter import AdapterFile, read_adapter
from lamina.checkpoint.origin import PREFIX, plain_key, record_of
from lamina.checkpoint.record import StageRecord
from lamina.checkpoint.sketch import FileWeights, compare
from lamina.checkpoint.stream.changes import Changes, changes_of
from lamina.checkpoint.stream.files import INDEX, ModelFiles, Reader, Stored, model_files
from lamina.checkpoint.stream.names import Naming, naming
from lamina.checkpoint.stream.plan import Plan, plan_of
from lamina.checkpoint.stream.restart import Unfinished, unfinished
from lamina.checkpoint.stream.run import Told, run
from lamina.engine.fold import not_foldable
from lamina.engine.names import places
from lamina.engine.ties import sharing
from lamina.errors import CheckpointError, FoldError, MissingFileError, StageError
from lamina.model import AutoPeftModel, PeftModel, loading
from lamina.model.vocabulary import grown
from lamina.stages.bases import base_faults, base_remarks, describe_base
from lamina.stages.likeness import over, tell, updates_in_file
from lamina.stages.merge_report import MergeReport, NotAsExpectedError
from lamina.stages.merged_files import MODEL_FILES, copy_beside, refuse_sources, write_config
from lamina.stages.merged_in_memory import Request
from lamina.stages.merged_verify import verified_of
from lamina.stages.tokenizers import tokenizer_faults, tokenizer_remarks, with_tokenizer
from lamina.storage.atomic import ADAPTER_FILES, atomic_directory
from lamina.storage.source import find_adapter

# Of `lamina.load`: all else is for loading the base.
_KNOWN = (*loading.HUB_OPTIONS, "allow_base_mismatch", "tokenizer")
# What is written beside the weights.
_REST = 64 * 2**20


class NotStreamable(Exception):
    """Why a merge has to be done in memory."""


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
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    record = record_of(file.config, shapes, file.metadata, source=file.source)
    if asked.base is not None:
        file.config.base_model_name_or_path, file.config.revision = asked.base, None
    base = _directory_of(file, hub)
    refuse_sources(asked.place, [str(base)])
    files = _files(base)
    model, before = _skeleton(file, base, files)
    names = _named(model, files)
    with Reader(base) as reader:
        given = _brought(model, file, names, files, reader)
        _untie_unequal(model, names, files, reader)
    with grown(model, file):
        if not asked.options.get("allow_base_mismatch", False):
            plain = {unit.keys[0]: unit.names[0] for unit in names.units if unit.load is None}
            weights = FileWeights(base, lambda _: plain)
            _check_base(record, model, file, asked.options.get("tokenizer"), weights)
        parameters = sum(p.numel() for p in model.parameters())
        kind = PeftModel.for_task(file.config.task_type)
        facade = loading.over(kind, model, file, loading.How(), record.newest.name).eval()
    changes = _changes(facade, record.newest.name, given)
    plan = plan_of(files, names, changes, asked.dtype)
    if plan.faults:
        raise NotStreamable(_told(plan.faults))
    config = _config(facade.get_base_model(), changes, before, asked.dtype, base)
    found = find_adapter(asked.path, **hub)
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


# --- the base ------------------------------------------------------------------------------------


def _directory_of(file: AdapterFile, hub: Mapping[str, Any]) -> Path:
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


def _files(base: Path) -> ModelFiles:
    try:
        return model_files(base)
    except MissingFileError as error:
        if (base / INDEX).is_file() and not str(base.parent).endswith("snapshots"):
            raise
        raise NotStreamable(f"the base has no safetensors files ({error.what})") from error


def _skeleton(file: AdapterFile, base: Path, files: ModelFiles) -> tuple[Any, dict[str, Any]]:
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


def _named(model: Any, files: ModelFiles) -> Naming:
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


def _brought(
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


def _untie_unequal(model: Any, names: Naming, files: ModelFiles, reader: Reader) -> None:
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


def _check_base(
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


# --- what changes --------------------------------------------------------------------------------


def _changes(facade: PeftModel, adapter: str, given: set[str]) -> Changes:
    state, root = facade.adapter_state, facade.get_base_model()
    if state.replication is not None:
        raise NotStreamable("the adapter replicates layers")
    changes = changes_of(root, adapter, state, given)
    if changes.refused:
        count = sum(1 for _ in places(root))
        raise not_foldable(changes.refused, count, tied=bool(sharing(places(root))))
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
        "base": _state_of(files),
        "adapter": [_digest(path) for path in adapter],
        "dtype": str(asked.dtype),
        "config": repr(sorted(config.items())),
    }


def _state_of(files: ModelFiles) -> dict[str, Any]:
    stats = {name: (files.directory / name).stat() for name in files.names}
    return {
        name: [stats[name].st_size, stats[name].st_mtime_ns, files.headers[name]]
        for name in files.names
    }


def _refuse_changed(prepared: Prepared) -> None:
    if _state_of(prepared.files) != prepared.identity["base"]:
        raise NotAsExpectedError(
            f"The base in '{prepared.base}' was changed while it was merged; nothing was saved.",
            cure="leave it alone, and merge again",
        )


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(2**20):
            found.update(chunk)
    return found.hexdigest()


# --- writing -------------------------------------------------------------------------------------


def merge_streaming(prepared: Prepared, told: Told | None = None) -> MergeReport:
    """Write what was planned, look at it, and publish it whole.

    Raises:
        CheckpointError: the disk is too small, or the result isn't what it should be.
        FoldError: NaN or infinity would come out.
    """
    asked, plan = prepared.asked, prepared.plan
    sizes = {file.name: file.size for file in plan.files}
    headers = {file.name: file.header for file in plan.files}
    with unfinished(asked.place, prepared.identity, sizes, headers) as place:
        _refuse_too_small(place, sizes)
        try:
            run(plan, prepared.base, place, told)
            _refuse_changed(prepared)
            tokenizer = _write_rest(prepared, place.model)
            seconds = time.monotonic() - prepared.began
            verified, why_not = verified_of(prepared, place.model)
        except (FoldError, NotAsExpectedError):
            place.discard()
            raise
        files = {
            str(file.relative_to(place.model)): file.stat().st_size
            for file in sorted(place.model.rglob("*"))
            if file.is_file()
        }
        with atomic_directory(asked.place, owned=(*ADAPTER_FILES, *MODEL_FILES)) as staging:
            place.hand_over(staging)
    return MergeReport(
        path=str(asked.place),
        model_class=prepared.model_class,
        dtype=plan.dtype,
        parameters=prepared.parameters,
        files=files,
        tokenizer=tokenizer,
        streamed=True,
        changed=plan.changed,
        kept_files=place.kept,
        seconds=seconds,
        verified=verified,
        why_not_verified=why_not,
    )


def _write_rest(prepared: Prepared, target: Path) -> str | None:
    write_config(prepared.base, prepared.config, target)
    if prepared.plan.index is not None:
        (target / INDEX).write_text(prepared.plan.index, encoding="utf-8")
    elif prepared.plan.keeps_index:
        shutil.copyfile(prepared.base / INDEX, target / INDEX)
    return copy_beside(prepared.base, prepared.adapter_directory, target)


def _refuse_too_small(place: Unfinished, sizes: Mapping[str, int]) -> None:
    needed = _REST + sum(size for name, size in sizes.items() if name not in place.done)
    free = shutil.disk_usage(place.directory).free
    if needed > free:
        if not place.done:
            shutil.rmtree(place.directory, ignore_errors=True)
        raise CheckpointError(
            f"The disk at '{place.directory.parent}' is too small for the merged model.",
            faults=[f"it takes {needed:,} bytes; {free:,} are free"],
            cure="free some space, or save to another disk",
        )
