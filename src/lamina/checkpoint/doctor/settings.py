"""Checks of the config: against itself, and against the tensors beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamina.checkpoint.doctor.findings import Finding
from lamina.checkpoint.doctor.patterns import (
    Targets,
    as_names,
    layer_of,
    plain_module,
    silent,
    wanted_layers,
)
from lamina.checkpoint.doctor.registry import check
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.record import Base, StageRecord
from lamina.checkpoint.shapes import scaling_in
from lamina.config import FORMAT_VERSION
from lamina.config.patterns import first_match, matching
from lamina.config.readable import numbers_hold
from lamina.errors import nearest

_CONFIG = "adapter_config.json"
_NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")
# Beginnings that take something out of the base's weights.
_DISPLACING = re.compile(r"pissa(_niter_\d+)?|olora|corda|lora_ga|loftq")
_TASK_HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}


@check
def missing_fields(config: dict[str, Any]) -> Iterator[Finding]:
    """Fields that every reader needs."""
    needed = [name for name in _NEEDED if name not in config]
    if config.get("peft_type") == "ADALORA":
        needed = [name for name in needed if name != "r"]
    if config.get("target_parameters"):
        needed = [name for name in needed if name != "target_modules"]
    if needed:
        what = f"{_CONFIG} lacks fields; readers take defaults of their own, or 0"
        cure = "add them with the values of the training run"
        yield Finding("warning", "field-missing", what, tuple(needed), cure)


@check
def ranks(config: dict[str, Any], contents: Contents) -> Iterator[Finding]:
    """Whether the ranks of the config are those of the tensors."""
    if config.get("peft_type") == "ADALORA" or not numbers_hold(config):
        return
    wrong = []
    for each in contents.factors:
        name = plain_module(each.module)
        told = int(first_match(config.get("rank_pattern") or {}, name, config.get("r") or 8))
        experts = contents.is_parameter(each) and each.rank % told == 0
        if each.rank != told and not experts:
            wrong.append(f"{each.module}: r={told} in the config, {each.rank} in the file")
    if wrong:
        what = "The config gives modules another rank than their tensors have"
        found = {each.rank for each in contents.factors}
        cure = "correct r and rank_pattern in adapter_config.json, and lora_alpha with them"
        if len(found) == 1:
            cure = f"set r to {found.pop()} in adapter_config.json, if lora_alpha is right"
        yield Finding("error", "rank-contradicts", what, tuple(wrong), cure)


@check
def silent_tables(config: dict[str, Any], contents: Contents) -> Iterator[Finding]:
    """Entries of rank_pattern and alpha_pattern that match nothing."""
    if config.get("peft_type") == "ADALORA" or not numbers_hold(config):
        return
    names = [plain_module(each.module) for each in contents.factors]
    for table in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(table) or {}
        found = [pattern for name in names for pattern in matching(patterns, name)]
        nothing = silent(patterns, found)
        # A parameter's own name isn't in the file.
        nothing = [] if config.get("target_parameters") else nothing
        if nothing:
            what = f"Entries of {table} match no module in the file"
            cure = f"remove them from {table}" + _near(nothing[0], names)
            yield Finding("warning", "pattern-matches-nothing", what, tuple(nothing), cure)


def _near(pattern: str, names: list[str]) -> str:
    close = nearest(pattern, {name.rpartition(".")[2] for name in names})
    return f"; {pattern!r} may have meant {close[0]!r}" if close else ""


@check
def targets(config: dict[str, Any], contents: Contents) -> Iterator[Finding]:
    """Whether the config's targets are the modules in the file."""
    patterns = config.get("target_modules")
    if patterns is None and not config.get("target_parameters"):
        return
    aims = Targets(config)
    found = {each.module: aims.hits(each.module) for each in contents.factors}
    stray = tuple(m for m, hit in found.items() if not hit or aims.excluded(m))
    if stray:
        what = "The file has modules that the config doesn't target; PEFT drops "
        cure = "add their names to target_modules (and take them out of exclude_modules)"
        yield Finding("error", "module-untargeted", f"{what}their tensors in silence", stray, cure)
    wanted = [*as_names(patterns), *as_names(config.get("target_parameters"))]
    nothing = silent(wanted, (pattern for hit in found.values() for pattern in hit))
    # PEFT writes whole names of what it leaves out again.
    nothing = [name for name in nothing if not (aims.excluded(name) or _outside(config, name))]
    if nothing and found:
        what = "Targets of the config have no tensors in the file"
        leaves = [plain_module(module) for module in found]
        cure = "take them out of target_modules if the model has no such modules (`lamina doctor "
        cure += f"DIR --base BASE` tells); else tensors are lost{_near(nothing[0], leaves)}"
        yield Finding("warning", "target-without-tensors", what, tuple(nothing), cure)


def _outside(config: dict[str, Any], module: str) -> bool:
    """Whether a module lies in a layer that layers_to_transform leaves out."""
    wanted = wanted_layers(config)
    layer = layer_of(config, module)
    return bool(wanted) and layer is not None and layer not in wanted


@check
def layers(config: dict[str, Any], contents: Contents) -> Iterator[Finding]:
    """Whether layers_to_transform are the layers in the file."""
    wanted = wanted_layers(config)
    if not wanted or not contents.factors:
        return
    found = {each.module: layer_of(config, each.module) for each in contents.factors}
    stray = tuple(module for module, layer in found.items() if layer not in wanted)
    if stray:
        what = "The file has modules in layers that layers_to_transform leaves out"
        cure = "set layers_to_transform to the layers that are in the file, or to null"
        yield Finding("error", "module-untargeted", what, stray, cure)
    lacking = tuple(f"layer {each}" for each in wanted if each not in found.values())
    if lacking:
        what = "Layers of layers_to_transform have no tensors in the file"
        cure = "set layers_to_transform to the layers that are in the file"
        yield Finding("warning", "target-without-tensors", what, lacking, cure)


@check
def saved_modules(config: dict[str, Any], contents: Contents) -> Iterator[Finding]:
    """Whether the modules of modules_to_save are in the file."""
    wanted = as_names(config.get("modules_to_save"))
    missing = [n for n in wanted if not any(owner.endswith(n) for owner in contents.wholes)]
    heads = _TASK_HEADS.get(str(config.get("task_type")), set())
    if len(missing) < len(wanted):
        # Of the usual heads of a task a model has one.
        missing = [name for name in missing if name not in heads]
    if missing:
        what = "Modules of modules_to_save are not in the file: readers that don't "
        cure = (
            "save it again with them; or take them out of modules_to_save if they weren't trained"
        )
        yield Finding(
            "error",
            "saved-module-missing",
            f"{what}refuse go on with the base's own, or with random ones",
            tuple(missing),
            cure,
        )


@check
def biases(config: dict[str, Any], contents: Contents) -> Iterator[Finding]:
    """Whether bias and the biases in the file agree."""
    kind = config.get("bias", "none")
    if kind == "none" and contents.biases:
        what = "bias is 'none', but biases of the base are in the file"
        cure = "set bias to 'all' or 'lora_only', as it was trained"
        yield Finding("warning", "bias-contradicts", what, contents.biases, cure)
    if kind in ("all", "lora_only") and not contents.biases and contents.factors:
        what = f"bias is {kind!r}, but the file has none: right for a model that has none itself"
        cure = "set bias to 'none'; some programs refuse adapters with biases"
        yield Finding("note", "bias-contradicts", what, ("bias",), cure)


@check
def beginning(config: dict[str, Any], contents: Contents) -> Iterator[Finding]:
    """Whether the adapter lies over the base as it is."""
    init = str(config.get("init_lora_weights", True)).lower()
    # Embeddings and convolutions begin as usual.
    linear = any(
        not contents.is_embedding(each) and not contents.is_convolution(each)
        for each in contents.factors
    )
    if linear and _DISPLACING.fullmatch(init):
        what = f"init_lora_weights is {init!r}: A and B lie over a base that lacks what they began "
        cure = "PeftModel.from_pretrained(base, DIR).save_pretrained(NEW) with Lamina, which takes "
        cure += "the same out of the base and writes an adapter for the base as it is"
        if init == "loftq":
            cure = "keep the base that it was trained over (LoftQ's, quantised and corrected) with "
            cure += "it, and give that as base"
        yield Finding(
            "warning",
            "init-changes-base",
            f"{what}with, and only readers that do the same again compute what was trained",
            ("init_lora_weights",),
            cure,
        )


@check
def named_base(config: dict[str, Any], recorded_base: Base) -> Iterator[Finding]:
    """Whether the base is named, and to be found."""
    name = config.get("base_model_name_or_path")
    if not (name or recorded_base.name_or_path):
        what = "base_model_name_or_path is empty: no reader finds the base by itself"
        cure = "set it in adapter_config.json to the hub id of the base, or give base= when loading"
        yield Finding("note", "base-unnamed", what, ("base_model_name_or_path",), cure)
    elif name and _is_path(str(name)) and not Path(str(name)).expanduser().exists():
        what = f"The base is named by a path that isn't here: {name}"
        cure = "set base_model_name_or_path to a hub id before handing it on, or give base= when "
        yield Finding(
            "warning", "base-path-missing", what, ("base_model_name_or_path",), f"{cure}loading"
        )


def _is_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or (os.path.isabs(name))
    )


@check
def version(config: dict[str, Any]) -> Iterator[Finding]:
    """Whether a newer PEFT wrote the config."""
    written = str(config.get("peft_version") or "")
    if _numbers(written) > _numbers(FORMAT_VERSION):
        what = f"Written by PEFT {written}, which is newer than the {FORMAT_VERSION} that is known"
        cure = "pip install --upgrade lamina, if anything about it looks wrong"
        yield Finding("note", "peft-newer", what, ("peft_version",), cure)


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


@check
def scaling_on_record(
    config: dict[str, Any], contents: Contents, record: StageRecord
) -> Iterator[Finding]:
    """Whether the config's scaling is the one that the record was written with."""
    newest = record.laminae[-1] if record.laminae else None
    if newest is None or not numbers_hold(newest.config):
        return
    wrong = []
    for each in contents.factors:
        r = newest.ranks.get(each.module)
        if r is None:
            continue
        told, found = scaling_in(newest.config, each.module, r), contents.scaling(each)
        if abs(told - found) > 1e-6 * abs(told):
            wrong.append(f"{each.module}: alpha / r is {found:g}, {told:g} on record")
    if wrong:
        what = f"The config scales modules otherwise than the stage {newest.stage!r} "
        cure = "undo the change of r, lora_alpha, use_rslora or a pattern in adapter_config.json"
        yield Finding("error", "scaling-contradicts", f"{what}was saved with", tuple(wrong), cure)
