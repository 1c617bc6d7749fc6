"""Read an adapter directory piece by piece: what can't be read becomes a finding, the rest goes on.

Nothing is written, nothing is unpickled, and no torch is needed.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lamina.checkpoint.doctor.evidence import Entries, Evidence, StoredTensor
from lamina.checkpoint.doctor.findings import Finding
from lamina.checkpoint.export.contents import Contents, sort_contents
from lamina.checkpoint.header import read_header
from lamina.checkpoint.origin import plain_key
from lamina.checkpoint.record import StageRecord, read_record
from lamina.config import CONFIG_NAME, LoraConfig, PeftConfig
from lamina.config.expressions import is_plain
from lamina.errors import CheckpointError, LaminaError
from lamina.storage.misplaced import INDEX_NAME, SAFETENSORS_NAME, no_config
from lamina.storage.shards import shard_names
from lamina.storage.source import PathOrId, find_adapter
from lamina.storage.staging import hidden_siblings
from lamina.storage.untrusted import open_regular

_AGAIN = "copy, download or save the file again"
_POINTER = b"version https://git-lfs"
# Of looking a module up in a table: a name's entry costs 1.
_COST_OF_EXPRESSION = 100
_MOST_WORK = 50_000_000


def adapter_directory(path_or_id: PathOrId, subfolder: str | None, **hub: Any) -> Path:
    """The directory to examine; of a hub id the one that it is downloaded to.

    Raises:
        CheckpointError: there is none.
    """
    local = Path(os.path.expanduser(os.fspath(path_or_id)))
    if local.is_dir():
        inside = local / (subfolder or "")
        if inside.is_dir():
            return inside
    # It says what is there instead, finishes a save that was cut off, or asks the hub.
    return find_adapter(path_or_id, subfolder=subfolder, **hub).config.parent


def read_evidence(directory: Path) -> tuple[Evidence, list[Finding]]:
    """What can be read of a directory without the values of its tensors, and what can't."""
    findings: list[Finding] = []
    try:
        entries = list_entries(directory)
    except OSError as error:
        return Evidence(directory), [_unreadable(directory, error)]
    config, found = _read_config(directory, entries)
    findings += found
    tensors, metadata, found = _read_tensors(directory, entries)
    findings += found
    if config is not None and _too_many_patterns(config, len(tensors or ())):
        findings.append(_PATTERNS)
        config = None
    settings, found = _settings(config)
    findings += found
    record, found = _read_record(metadata)
    findings += found
    contents, found = _contents(directory, config, tensors, metadata)
    findings += found
    return (
        Evidence(directory, entries, config, settings, tensors, metadata, contents, record),
        findings,
    )


def list_entries(directory: Path) -> Entries:
    """The names in a directory and in its folders.

    Raises:
        OSError: it can't be listed.
    """
    files: dict[str, int] = {}
    folders: dict[str, tuple[str, ...]] = {}
    with os.scandir(directory) as found:
        for entry in sorted(found, key=lambda each: each.name):
            if entry.is_dir():
                folders[entry.name] = _names_in(entry.path)
            else:
                files[entry.name] = _bytes_of(entry)
    siblings = tuple(
        path.name for kind in ("saving", "old") for path in hidden_siblings(directory, kind)
    )
    return Entries(files, folders, siblings)


def _names_in(folder: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError:
        return ()


def _bytes_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def _unreadable(path: Path, error: OSError) -> Finding:
    return Finding(
        "error",
        "file-unreadable",
        f"{path.name} can't be read: {error.strerror or error}",
        (str(path),),
        f"chmod u+r '{path}', or copy it from where it can be read",
    )


# --- the config ----------------------------------------------------------------------------------


def _read_config(directory: Path, entries: Entries) -> tuple[dict[str, Any] | None, list[Finding]]:
    if CONFIG_NAME not in entries.files:
        return None, [_without_config(directory, entries)]
    try:
        return PeftConfig.from_json_file(directory / CONFIG_NAME), []
    except OSError as error:
        return None, [_unreadable(directory / CONFIG_NAME, error)]
    except (LaminaError, ValueError) as error:
        what = error.what if isinstance(error, LaminaError) else str(error)
        cure = "copy or download it again; its values can be had from a checkpoint of the same run"
        return None, [Finding("error", "config-unreadable", what, (CONFIG_NAME,), cure)]


def _without_config(directory: Path, entries: Entries) -> Finding:
    names = {*entries.files, *(f"{folder}/" for folder in entries.folders)}
    names |= {f"{folder}/{name}" for folder, inside in entries.folders.items() for name in inside}
    error = no_config(str(directory), names, lambda folder: f"lamina doctor '{directory / folder}'")
    code = "adapter-elsewhere" if _adapters_inside(entries) else "config-missing"
    if "config.json" in entries.files and code == "config-missing":
        code = "full-model"
    return Finding("error", code, error.what, error.faults, error.cure or "")


def _adapters_inside(entries: Entries) -> bool:
    return any(
        CONFIG_NAME in inside or folder.startswith("checkpoint-")
        for folder, inside in entries.folders.items()
    )


_PATTERNS = Finding(
    "error",
    "patterns-too-many",
    "rank_pattern and alpha_pattern have so many entries that none was looked at",
    ("rank_pattern", "alpha_pattern"),
    "give modules of one name one entry: {'q_proj': 8} means all of them",
)


def _too_many_patterns(config: dict[str, Any], tensors: int) -> bool:
    """Whether looking up all modules would take minutes."""
    tables = [config.get(name) for name in ("rank_pattern", "alpha_pattern")]
    patterns = [str(each) for table in tables if isinstance(table, dict) for each in table]
    cost = sum(1 if is_plain(each) else _COST_OF_EXPRESSION for each in patterns)
    return cost * max(1, tensors) > _MOST_WORK


def _settings(config: dict[str, Any] | None) -> tuple[LoraConfig | None, list[Finding]]:
    if config is None:
        return None, []
    try:
        with warnings.catch_warnings():
            # Settings that have no effect are told by checks of their own.
            warnings.simplefilter("ignore")
            return cast(LoraConfig, PeftConfig.from_dict(dict(config), source=CONFIG_NAME)), []
    except LaminaError as error:
        return None, [
            Finding("error", "config-refused", error.what, error.faults, error.cure or "")
        ]
    except Exception as error:
        what = f"{CONFIG_NAME} has values that make no config: {error}"
        cure = "correct them; the values are those of peft.LoraConfig"
        return None, [Finding("error", "config-refused", what, cure=cure)]


# --- the weights ---------------------------------------------------------------------------------

_Tensors = dict[str, StoredTensor] | None


def _read_tensors(
    directory: Path, entries: Entries
) -> tuple[_Tensors, dict[str, str] | None, list[Finding]]:
    files, findings = _weight_files(directory, entries)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    readable = False
    for file in files:
        found = _read_file(file)
        findings += found.findings
        readable |= found.readable
        metadata.update(found.metadata)
        findings += _add(tensors, found.tensors)
    return (tensors, metadata, findings) if readable else (None, None, findings)


def _weight_files(directory: Path, entries: Entries) -> tuple[list[Path], list[Finding]]:
    """The files that every reader takes, as `find_adapter` does."""
    if SAFETENSORS_NAME in entries.files:
        return [directory / SAFETENSORS_NAME], []
    # What is wrong with having none is told by the checks of the directory.
    if INDEX_NAME not in entries.files:
        return [], []
    try:
        names = shard_names(directory / INDEX_NAME, INDEX_NAME)
    except OSError as error:
        return [], [_unreadable(directory / INDEX_NAME, error)]
    except CheckpointError as error:
        where = error.faults or (INDEX_NAME,)
        return [], [Finding("error", "index-broken", error.what, where, error.cure or "")]
    return [directory / name for name in names if name in entries.files], []


@dataclass(frozen=True)
class _File:
    findings: tuple[Finding, ...]
    readable: bool = False
    tensors: tuple[StoredTensor, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def _read_file(file: Path) -> _File:
    try:
        with open_regular(file) as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                return _File((_pointer(file),))
        header, metadata = read_header(file)
    except (LaminaError, OSError) as error:
        return _read_damaged(file, error)
    return _File((), True, _tensors_of(file, header), metadata)


def _read_damaged(file: Path, error: LaminaError | OSError) -> _File:
    """What can be read of a file in which tensors don't lie as they should; else only why."""
    if isinstance(error, OSError) and not isinstance(error, LaminaError):
        return _File((_unreadable(file, error),))
    assert isinstance(error, LaminaError)
    try:
        header, metadata = read_header(file, check_layout=False)
    except (LaminaError, OSError):
        code = "file-cut-off" if "is cut off" in error.what else "weights-unreadable"
        where = error.faults or (file.name,)
        return _File((Finding("error", code, error.what, where, error.cure or _AGAIN),))
    damaged = Finding("error", "layout-broken", error.what, error.faults, error.cure or _AGAIN)
    return _File((damaged,), True, _tensors_of(file, header), metadata)


def _tensors_of(file: Path, header: Mapping[str, Any]) -> tuple[StoredTensor, ...]:
    return tuple(
        StoredTensor(key, file, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for key, entry in header.items()
    )


def _pointer(file: Path) -> Finding:
    return Finding(
        "error",
        "lfs-pointer",
        f"{file.name} is not the weights but a pointer of git-lfs to them",
        (file.name,),
        "git lfs pull, in the repository that it was cloned from",
    )


def _add(tensors: dict[str, StoredTensor], new: tuple[StoredTensor, ...]) -> list[Finding]:
    """Enter tensors by their plain names; those that are there already become a finding."""
    twice = []
    for each in new:
        name = plain_key(each.key)
        if name in tensors:
            twice.append(each.key)
        else:
            tensors[name] = each
    if not twice:
        return []
    return [
        Finding(
            "error",
            "names-collide",
            "Tensors have the name of another one, adapter names and wrappers "
            "left out: there may be two adapters in one file",
            tuple(twice),
            "save each adapter into a directory of its own: "
            "model.save_pretrained(DIR, selected_adapters=[NAME])",
        )
    ]


# --- the record, and all together ----------------------------------------------------------------


def _read_record(metadata: dict[str, str] | None) -> tuple[StageRecord | None, list[Finding]]:
    if metadata is None:
        return None, []
    try:
        return read_record(metadata), []
    except LaminaError as error:
        newer = re.search(r"has version \d+", error.what)
        code = "record-newer" if newer else "record-broken"
        cure = error.cure or "open it as a plain adapter with PeftModel.from_pretrained"
        return None, [Finding("error", code, error.what, error.faults, cure)]


def _contents(
    directory: Path,
    config: dict[str, Any] | None,
    tensors: _Tensors,
    metadata: dict[str, str] | None,
) -> tuple[Contents | None, list[Finding]]:
    if config is None or tensors is None:
        return None, []
    header = {name: {"shape": list(each.shape)} for name, each in tensors.items()}
    try:
        return sort_contents(str(directory), config, header, metadata), []
    except Exception as error:
        what = f"Config and tensors can't be brought together: {type(error).__name__}: {error}"
        cure = "correct the config's values, or save the adapter again"
        return None, [Finding("error", "config-refused", what, cure=cure)]
