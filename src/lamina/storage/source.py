"""Find an adapter's files, in a local directory or a hub repository."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lamina.errors import CheckpointError, MissingFileError, nearest
from lamina.storage.atomic import recover
from lamina.storage.hub import HubAccess, HubRepository
from lamina.storage.misplaced import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLE_NAME,
    SAFETENSORS_NAME,
    no_config,
    no_weights,
    only_pickle,
)
from lamina.storage.shards import weight_map

PathOrId = str | os.PathLike[str]

# transformers shards an adapter too, but names the index as it names a full model's.
_INDEX_NAMES = (INDEX_NAME, "model.safetensors.index.json")
_SHOWN = 20


@dataclass(frozen=True)
class AdapterFiles:
    """The files of one adapter, all on the local disk.

    Attributes:
        config: `adapter_config.json`.
        weights: one safetensors file, all shards by name, or one pickle.
        root: the directory, or the hub id with its subfolder, for messages.
        pickle: whether `weights` is a pickle, to be read with `weights_only=True`.
        weight_map: of shards, name of a tensor -> name of the file that the index has it in.
    """

    config: Path
    weights: tuple[Path, ...]
    root: str
    pickle: bool
    weight_map: Mapping[str, str] = field(default_factory=dict)


def find_adapter(
    path_or_id: PathOrId,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathOrId | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    allow_pickle: bool = False,
) -> AdapterFiles:
    """The config and weights of an adapter: one safetensors file, shards with an index, a pickle.

    Args:
        path_or_id: a directory, or `owner/name` on the hub; what exists locally is local.
        subfolder: a folder inside, as peft makes one for each adapter but "default".
        revision: a branch, tag or commit of the hub repository.
        token: for private repositories; None takes the one that is logged in.
        cache_dir: where downloads are kept; None takes the usual place.
        local_files_only: never ask the hub, take what the cache has.
        force_download: download again what the cache has.
        allow_pickle: take `adapter_model.bin` where there are no safetensors.

    Raises:
        MissingFileError: something isn't there; says what is, and where an adapter may be.
        CheckpointError: only a pickle, a bad index, or the hub refuses.
    """
    access = HubAccess(revision, token, cache_dir, local_files_only, force_download)
    place = _place(path_or_id, subfolder, access)
    config = _config_in(place)
    weights, pickle, table = _weights_in(place, allow_pickle)
    return AdapterFiles(config, weights, place.label, pickle, table)


def find_config(
    path_or_id: PathOrId,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathOrId | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The `adapter_config.json` alone; arguments and errors as for `find_adapter`."""
    access = HubAccess(revision, token, cache_dir, local_files_only, force_download)
    return _config_in(_place(path_or_id, subfolder, access))


class _Place(Protocol):
    """Where files are looked up by name."""

    @property
    def label(self) -> str: ...
    def get(self, name: str) -> Path | None: ...
    def has(self, name: str) -> bool: ...
    def without_config(self) -> CheckpointError: ...
    def without_weights(self) -> CheckpointError: ...


@dataclass(frozen=True)
class _LocalDirectory:
    """A directory that exists, and how the user named it."""

    base: Path
    subfolder: str | None

    @property
    def _path(self) -> Path:
        return self.base / (self.subfolder or "")

    @property
    def label(self) -> str:
        return str(self._path)

    def get(self, name: str) -> Path | None:
        file = self._path / name
        return file if os.path.isfile(file) else None

    def has(self, name: str) -> bool:
        return self.get(name) is not None

    def names(self) -> Collection[str]:
        found: set[str] = set()
        for entry in _entries(self._path):
            if not _is_folder(entry):
                found.add(entry.name)
            elif not entry.name.startswith("."):
                found |= {f"{entry.name}/", *(f"{entry.name}/{x.name}" for x in _entries(entry))}
        return found

    def call(self, folder: str) -> str:
        if folder.startswith("checkpoint-"):
            return f"PeftModel.from_pretrained(model, '{self._path / folder}')"
        inside = "/".join(part for part in (self.subfolder, folder) if part)
        return f"PeftModel.from_pretrained(model, '{self.base}', subfolder='{inside}')"

    def without_config(self) -> CheckpointError:
        return no_config(self.label, self.names(), self.call)

    def without_weights(self) -> CheckpointError:
        return no_weights(self.label, self.names())


def _place(path_or_id: PathOrId, subfolder: str | None, access: HubAccess) -> _Place:
    text = os.fspath(path_or_id)
    subfolder = subfolder.strip("/") or None if subfolder else None
    base = Path(os.path.expanduser(text))
    if text:
        recover(base)
    if text and os.path.exists(base):
        return _local(base, subfolder)
    if not isinstance(path_or_id, str) or _looks_local(text):
        raise _no_directory(text, base)
    return HubRepository(text, subfolder, access, like=_spelled_like(base))


def _local(base: Path, subfolder: str | None) -> _LocalDirectory:
    if not base.is_dir():
        raise CheckpointError(
            f"'{base}' is a file; an adapter is given as the directory that holds its files.",
            cure=f"give '{base.parent}'",
        )
    if not os.access(base, os.R_OK | os.X_OK):
        raise CheckpointError(
            f"'{base}' can't be read: permission denied.", cure=f"chmod u+rx '{base}'"
        )
    if subfolder:
        recover(base / subfolder)
        if not (base / subfolder).is_dir():
            folders = [entry.name for entry in _entries(base) if _is_folder(entry)]
            close = nearest(subfolder, folders)
            raise MissingFileError(
                f"'{base}' has no subfolder '{subfolder}'.",
                faults=[f"it has '{name}'" for name in sorted(folders)],
                cure=f"pass subfolder='{close[0]}'" if close else "leave subfolder= out",
            )
    return _LocalDirectory(base, subfolder)


def _looks_local(text: str) -> bool:
    """Whether a name that doesn't exist was meant as a path and not as a hub id."""
    if text.startswith((".", "/", "~")) or text.endswith("/") or "\\" in text:
        return True
    parent, slash, _ = text.rpartition("/")
    return "/" in parent or bool(slash and os.path.isdir(parent))


def _no_directory(text: str, base: Path) -> CheckpointError:
    url = re.fullmatch(r"(?:https?://(?:huggingface\.co|hf\.co)/|hf://)([^/]+/[^/]+).*", text)
    if url:
        return MissingFileError(
            f"'{text}' is an address; a hub repository is given by its id.", cure=f"'{url[1]}'"
        )
    ground = _existing_parent(base)
    like = _spelled_like(base)
    return MissingFileError(
        f"There is no directory '{base}'.",
        faults=[f"the nearest that exists is '{ground}'"],
        cure=f"did you mean '{like}'?" if like else "check the path",
    )


def _existing_parent(base: Path) -> Path:
    return next((folder for folder in base.parents if os.path.isdir(folder)), base.parent)


def _spelled_like(base: Path) -> Path | None:
    """`base` with its first part that doesn't exist replaced by the nearest one that does."""
    ground = _existing_parent(base)
    wrong, *rest = base.relative_to(ground).parts or ("",)
    siblings = [entry.name for entry in _entries(ground) if not entry.name.startswith(".")]
    close = nearest(wrong, siblings)
    return ground.joinpath(close[0], *rest) if close else None


def _config_in(place: _Place) -> Path:
    config = place.get(CONFIG_NAME)
    if config is None:
        raise place.without_config()
    return config


def _weights_in(
    place: _Place, allow_pickle: bool
) -> tuple[tuple[Path, ...], bool, Mapping[str, str]]:
    single = place.get(SAFETENSORS_NAME)
    if single is not None:
        return (single,), False, {}
    for name in _INDEX_NAMES:
        index = place.get(name)
        table = weight_map(index, f"{place.label}/{name}") if index is not None else {}
        shards = sorted(set(table.values()))
        # The index of a full model that lies beside the adapter is none of ours.
        ours = name == INDEX_NAME or all(shard.startswith("adapter_model") for shard in shards)
        if shards and ours:
            return _shards_in(place, shards, name), False, table
    if allow_pickle:
        pickle = place.get(PICKLE_NAME)
        if pickle is not None:
            return (pickle,), True, {}
    elif place.has(PICKLE_NAME):
        raise only_pickle(place.label)
    raise place.without_weights()


def _shards_in(place: _Place, names: list[str], index: str) -> tuple[Path, ...]:
    found = {name: place.get(name) for name in names}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise MissingFileError(
            f"'{place.label}' has {len(names) - len(missing)} of the {len(names)} shards that "
            f"{index} names.",
            faults=[f"{name[:200]!r} is missing" for name in missing[:_SHOWN]],
            cure="copy or download the missing files",
        )
    return tuple(file for file in found.values() if file is not None)


def _entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself.
        return False
