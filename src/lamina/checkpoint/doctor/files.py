"""Checks of the directory: which files are there, and which contradict one another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lamina.checkpoint.doctor.evidence import Entries, StoredTensor
from lamina.checkpoint.doctor.findings import Finding
from lamina.checkpoint.doctor.registry import check
from lamina.storage.misplaced import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLE_NAME,
    SAFETENSORS_NAME,
    no_weights,
)
from lamina.storage.untrusted import read_json

_PICKLE = re.compile(r"adapter_model(-\d+-of-\d+)?\.(bin|pt|pth|ckpt)")
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
_OTHER_NAMES = re.compile(
    r"(pytorch_lora_weights|adapters|lora|lora_weights|pytorch_adapter)\.(safetensors|npz|bin)"
)


@check
def missing_weights(directory: Path, entries: Entries) -> Iterator[Finding]:
    """Whether there are weights that can be read."""
    names = entries.files
    if SAFETENSORS_NAME in names or INDEX_NAME in names or CONFIG_NAME not in names:
        return
    pickles = _pickles(entries)
    if pickles:
        yield Finding(
            "error",
            "pickle-only",
            "The weights are there only as a pickle, and opening a pickle can run any code that "
            "its author put in",
            pickles,
            "if you trust its author: PeftModel.from_pretrained(base, DIR, allow_pickle=True)"
            ".save_pretrained(NEW) makes safetensors of it",
        )
        return
    error = no_weights(str(directory), names)
    others = tuple(name for name in names if _OTHER_NAMES.fullmatch(name))
    cure = error.cure or ""
    if others:
        cure = f"if {others[0]} is the adapter in another tool's form, convert it with that tool"
    yield Finding("error", "weights-missing", error.what, others or error.faults, cure)


@check
def pickle_twin(entries: Entries) -> Iterator[Finding]:
    """Pickles beside the weights."""
    pickles = _pickles(entries)
    if pickles and (SAFETENSORS_NAME in entries.files or INDEX_NAME in entries.files):
        yield Finding(
            "warning",
            "pickle-twin",
            "Weights lie there as a pickle too: it may be older than the safetensors, some readers "
            "take it, and opening it can run code",
            pickles,
            f"delete {', '.join(pickles)}",
        )


def _pickles(entries: Entries) -> tuple[str, ...]:
    found = [name for name in entries.files if _PICKLE.fullmatch(name)]
    return tuple(sorted(found, key=lambda name: name != PICKLE_NAME))


@check
def stale_shards(entries: Entries) -> Iterator[Finding]:
    """Shards beside a single file."""
    shards = [name for name in entries.files if _SHARD.fullmatch(name)]
    index = [INDEX_NAME] if INDEX_NAME in entries.files else []
    if SAFETENSORS_NAME in entries.files and (shards or index):
        yield Finding(
            "warning",
            "stale-shards",
            f"There is {SAFETENSORS_NAME} and an adapter in shards too: one of them is a leftover, "
            "and readers differ in which they take (Lamina and PEFT take the single file)",
            (*index, *shards),
            "delete the shards and the index, if the single file is the newer one",
        )


@check
def index_against_files(
    directory: Path, entries: Entries, tensors: Mapping[str, StoredTensor]
) -> Iterator[Finding]:
    """Whether the index of shards tells the truth."""
    if INDEX_NAME not in entries.files or SAFETENSORS_NAME in entries.files:
        return
    table = _weight_map(directory / INDEX_NAME)
    named = {*table.values()}
    held = {each.key: each.file.name for each in tensors.values()}
    missing = tuple(sorted(named - entries.files.keys()))
    if missing:
        what = f"{INDEX_NAME} names files that are not there"
        yield Finding("error", "shard-missing", what, missing, "copy or download them too")
    stray = tuple(n for n in entries.files if _SHARD.fullmatch(n) and n not in named)
    if stray:
        what = f"Shards are not named in {INDEX_NAME}: leftovers of another save"
        yield Finding("warning", "shard-stray", what, stray, f"delete {', '.join(stray)}")
    there = named - set(missing)
    wrong = tuple(key for key, name in table.items() if name in there and held.get(key) != name)
    wrong += tuple(key for key in held if key not in table)
    if wrong:
        what = f"{INDEX_NAME} and the shards differ in which file has which tensors"
        cure = "the files are of different saves; copy all of them from one"
        yield Finding("error", "index-contradicts", what, wrong, cure)


def _weight_map(index: Path) -> dict[str, str]:
    table: Any = read_json(index)["weight_map"]
    return {str(key): str(name) for key, name in table.items()}


@check
def unreadable_files(directory: Path, entries: Entries) -> Iterator[Finding]:
    """Links that lead nowhere, and empty files."""
    names = [name for name in entries.files if name.startswith("adapter_")]
    broken = tuple(name for name in names if entries.files[name] < 0)
    if broken:
        what = "Links lead to files that are not there"
        cure = f"copy the files themselves: cp -rL '{directory}' NEW, where they are"
        yield Finding("error", "link-broken", what, broken, cure)
    empty = tuple(name for name in names if entries.files[name] == 0)
    if empty:
        what = "Files are empty: a copy or a save was cut off"
        yield Finding("error", "file-empty", what, empty, "copy, download or save them again")


@check
def leftovers(directory: Path, entries: Entries) -> Iterator[Finding]:
    """Leftovers of saves that were cut off."""
    if entries.siblings:
        yield Finding(
            "note",
            "save-cut-off",
            "A save of this directory was cut off, or is under way; what is in the directory is "
            "whole",
            tuple(str(directory.parent / name) for name in entries.siblings),
            "the next save removes them",
        )
