"""From a path in a plan to the files that are meant: one, a folder of them, or a pattern."""

from __future__ import annotations

import glob
import re
from collections import Counter
from pathlib import Path

from lamina.errors import DataError, nearest
from lamina.training.data.reading import KINDS, kind_of
from lamina.training.plan.located import is_pattern, place_of

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
# Beside data, not data; the last by `Dataset.save_to_disk`.
_ABOUT = {"readme", "license", "licence", "changelog", "citation", "dataset_info", "dataset_infos"}
_SAVED = {"state", "dataset_dict"}
_TAKEN = ", ".join(KINDS)


def is_hub_name(path: str) -> bool:
    """Whether a path that isn't there locally can be `owner/name` on the hub."""
    return bool(_HUB_NAME.match(path)) and Path(path).suffix.lower() not in {*KINDS, ".gz"}


def find_files(path: str, split: str, root: Path) -> list[Path] | None:
    """The files that a path means, in the order of their names; None if it is a hub name.

    In a folder whose files, or the folders around them, are named after splits ("train.jsonl",
    "data/test/..."), those of `split` are taken; where none is, all of them are "train".

    Raises:
        DataError: nothing is there, or it isn't clear what is meant.
    """
    place = place_of(path, root)
    if place.is_file():
        return _said_alone([_of_known_kind(place)], split)
    if place.is_dir():
        found = [each for each in sorted(place.rglob("*")) if _is_data(each, place)]
        return _of_split(path, _of_one_kind(path, place, found), split, place)
    if is_pattern(path):
        named = sorted(map(Path, glob.glob(str(place), recursive=True)))
        found = [each for each in named if each.is_file()]
        if not found:
            raise DataError(f"No file matches {path}.", cure=f"a pattern below {root.resolve()}")
        known = [_of_known_kind(each) for each in found]
        return _said_alone(_of_one_kind(path, root, known), split)
    if is_hub_name(path):
        return None
    raise _nothing_there(path, place)


def _is_data(file: Path, folder: Path) -> bool:
    inside = file.relative_to(folder).parts
    hidden = any(part.startswith((".", "_")) for part in inside)
    return file.is_file() and not hidden and bool(kind_of(file)) and not _is_about(file)


def _is_about(file: Path) -> bool:
    stem = file.name.lower().partition(".")[0]
    saved = stem in _SAVED and any(file.parent.rglob("dataset_info.json"))
    return stem in _ABOUT or saved


def _of_known_kind(file: Path) -> Path:
    if kind_of(file) is None:
        raise DataError(f"{file} is of no kind that is known.", cure=f"one of {_TAKEN}, or .gz")
    return file


def _of_one_kind(path: str, folder: Path, found: list[Path]) -> list[Path]:
    if not found:
        kept = sorted(each.name for each in folder.iterdir())[:8]
        holds = f"it holds {', '.join(kept)}" if kept else "it is empty"
        cure = f"files of one kind: {_TAKEN}"
        raise DataError(f"{path} holds no data files: {holds}.", cure=cure)
    kinds = Counter(kind_of(each) for each in found)
    if len(kinds) > 1:
        told = [f"{count} of {kind}" for kind, count in kinds.items()]
        cure = f"say which: {path.rstrip('/')}/*.jsonl"
        raise DataError(f"{path} holds files of several kinds.", faults=told, cure=cure)
    return found


def _of_split(path: str, found: list[Path], split: str, folder: Path) -> list[Path]:
    wanted = split.partition("[")[0]
    named = {file: _split_of(file, folder) for file in found}
    if not any(named.values()):
        if wanted != "train":
            cure = "split: train, or files that are named after splits"
            raise DataError(f"No file of {path} is named after a split {wanted!r}.", cure=cure)
        return found
    unnamed = [file.name for file, each in named.items() if each is None]
    if unnamed:
        told = [f"{name} names no split, others do" for name in unnamed]
        cure = "name them alike, or give a pattern such as folder/train*.jsonl"
        raise DataError(f"It isn't clear what of {path} is {wanted!r}.", faults=told, cure=cure)
    taken = [file for file, each in named.items() if each == _SPLITS.get(wanted, wanted)]
    if not taken:
        there = ", ".join(sorted({str(each) for each in named.values()}))
        raise DataError(f"{path} has no split {wanted!r}.", cure=f"one of {there}")
    return taken


def _said_alone(found: list[Path], split: str) -> list[Path]:
    """Files that a plan names: "train", whatever their names say, or what their names say."""
    wanted = "train" if "+" in split else split.partition("[")[0]
    others = [
        file.name
        for file in found
        if wanted != "train" and _split_of(file, file.parent) != _SPLITS.get(wanted, wanted)
    ]
    if others:
        told = [f"{name} isn't named after a split {wanted!r}" for name in others]
        raise DataError("A file has one split.", faults=told, cure="leave split out")
    return found


def _split_of(file: Path, folder: Path) -> str | None:
    parts = file.relative_to(folder).parts
    words = [re.split(r"[-_. ]", part, maxsplit=1)[0].lower() for part in (*parts[:-1], file.name)]
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


def _nothing_there(path: str, place: Path) -> DataError:
    folder = place.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [each.name for each in folder.iterdir()]
    close = nearest(place.name if folder == place.parent else place.parts[len(folder.parts)], names)
    told = [f"in {folder} there is {', '.join(map(repr, close))}"] if close else []
    return DataError(
        f"There is no {path}: no file, no folder, and no name of a hub dataset (owner/name).",
        faults=told,
        cure=f"a path that is there, from {folder.resolve()}, or from the plan's folder",
    )
