"""Change a chain that is on disk: take its last stage off, or give a stage another name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.checkpoint.adapter import WEIGHTS_NAME, AdapterFile, read_adapter, write_adapter
from lamina.checkpoint.chain import makers_of
from lamina.checkpoint.header import read_header
from lamina.checkpoint.origin import faults_of_others, plain_key
from lamina.checkpoint.record import StageRecord
from lamina.checkpoint.rewrite import rewrite_strings
from lamina.config import CONFIG_NAME
from lamina.errors import CheckpointError, StageError, nearest
from lamina.model.original import scaling_of
from lamina.stages.assembling import adapter_of, write_stage
from lamina.stages.lamination import Chain, take_apart
from lamina.stages.lineage import lineage
from lamina.stages.names import name_faults
from lamina.stages.selection import select
from lamina.storage.atomic import atomic_directory
from lamina.storage.companions import copy_tokenizer
from lamina.storage.destination import check_destination
from lamina.storage.source import AdapterFiles, find_adapter


@dataclass(frozen=True)
class EditReport:
    """What was saved.

    Attributes:
        path: the directory.
        stages: the names of the stages that the chain has now, oldest first.
        dropped: the stage that was taken off; None if none was.
        renamed: old and new name; None if no stage was renamed.
    """

    path: str
    stages: tuple[str, ...]
    dropped: str | None = None
    renamed: tuple[str, str] | None = None


def drop_last_stage(
    path: str | Path, out: str | Path | None = None, *, force: bool = False, **where: Any
) -> EditReport:
    """The chain as it was before its last stage, which must have added ranks of its own.

    The stage before becomes the newest: its scaling is the file's, and its expected answers are
    those on record. What the dropped stage trained whole is the base's again. Works on files alone.

    Args:
        path: the stage's directory; a hub id only with `out`.
        out: where the result goes; None replaces the adapter at `path`, in one step.
        force: save into an `out` that has files already.
        where: `subfolder` and hub options of `path`.

    Raises:
        StageError: it is the only stage, it went on training older ranks, or it replaced values of
            older stages that are nowhere in the file.
        CheckpointError: files are missing or broken, or `out` is taken.
    """
    files = find_adapter(path, **where)
    place = _place(path, files, out, force)
    # What is read is what is replaced: no other save comes between.
    with atomic_directory(place) as staging:
        file = read_adapter(path, **where)
        chain = take_apart(file)
        left, record = _without_last(file, chain)
        write_stage(staging, left, record)
        if out is not None:
            copy_tokenizer(files.config.parent, staging)
    names = tuple(stage.name for stage in record.stages)
    return EditReport(str(place), names, dropped=chain.record.newest.name)


def _without_last(file: AdapterFile, chain: Chain) -> tuple[AdapterFile, StageRecord]:
    _check_droppable(chain.record, chain.source)
    selection = select(chain, range(len(chain.parts) - 1))
    if selection.overwritten:
        raise StageError(
            f"{chain.source} no longer has all that it was before {chain.record.newest.name!r}.",
            faults=selection.overwritten,
            cure=f"use the directory of the stage before, {chain.record.stages[-2].name!r}, if you "
            "have it",
        )
    newest = selection.chain.parts[-1].config
    left = adapter_of(file, chain, selection, newest, scaling_of(newest))
    return left, selection.chain.record


def rename_stage(
    path: str | Path,
    old: str,
    new: str,
    out: str | Path | None = None,
    *,
    force: bool = False,
    **where: Any,
) -> EditReport:
    """Give a stage another name in the record; the tensors' bytes stay what they are.

    A plain adapter is one stage called "imported"; renaming that gives it a record.

    Args:
        path: the stage's directory; a hub id only with `out`.
        old: the name it has.
        new: the name it gets, by the rules for `begin_stage`.
        out: where the result goes; None replaces the adapter at `path`, in one step.
        force: save into an `out` that has files already.
        where: `subfolder` and hub options of `path`.

    Raises:
        StageError: there is no such stage, or the new name can't be used.
        CheckpointError: files are missing or broken, or `out` is taken.
    """
    files = find_adapter(path, **where)
    place = _place(path, files, out, force)
    if files.pickle:
        raise CheckpointError(
            f"{files.root} is a pickle, which has no place for a record.",
            cure="lamina flatten DIR -o OUT saves it as safetensors with a record",
        )
    # What is read is what is replaced: no other save comes between.
    with atomic_directory(place) as staging:
        changed = _with_name(path, where, files, old, new)
        _rewrite(path, where, files, staging, changed)
        if out is not None:
            copy_tokenizer(files.config.parent, staging)
    now = tuple(stage.name for stage in changed.stages)
    return EditReport(str(place), now, renamed=(old, new))


def _with_name(
    path: str | Path, where: dict[str, Any], files: AdapterFiles, old: str, new: str
) -> StageRecord:
    """The record with a stage's other name."""
    record = lineage(path, **where)
    faults = _rename_faults(record, old, new)
    if faults:
        raise StageError(
            f"Stage {old!r} of {files.root} can't be called {new!r}.",
            faults=faults,
            cure="`lamina lineage DIR` shows the names",
        )
    changed = _renamed(record, {old: new})
    names = {key for file in files.weights for key in read_header(file)[0]}
    along = faults_of_others(changed, map(plain_key, names))
    if along:
        raise StageError(
            f"{files.root} can't have a record, and so no stage of a name.",
            faults=along,
            cure="resize the base as it was in training, begin a stage on it and save that",
        )
    return changed


def _place(path: str | Path, files: AdapterFiles, out: str | Path | None, force: bool) -> Path:
    """Where the result goes."""
    if out is not None:
        return check_destination(out, [files.config.parent], force=force)
    if not Path(path).expanduser().is_dir():
        raise CheckpointError(
            f"{files.root} is on the hub, where nothing can be replaced.",
            cure="give a directory for the result: out=... (-o OUT)",
        )
    return files.config.parent


def _check_droppable(record: StageRecord, source: str) -> None:
    last, makers = record.newest, makers_of(record)
    if len(record.stages) == 1:
        raise StageError(
            f"{last.name!r} is the only stage of {source}: nothing would be left.",
            cure="remove the directory, if that is what you want",
        )
    flattened = [lamina for lamina in record.laminae if last.name in lamina.made_of]
    if flattened:
        raise StageError(
            f"{last.name!r} is one with {', '.join(flattened[0].made_of[:-1])} in {source}, since "
            "the chain was flattened.",
            cure="use the directory that it was flattened from, if you have it",
        )
    owners = [names for names in makers if last.name in names]
    if last.mode == "continue" or owners != [(last.name,)] or makers[-1] != (last.name,):
        before = record.stages[-2].name
        raise StageError(
            f"{last.name!r} went on training ranks that were there before: what they were after "
            f"{before!r} is not in {source} any more.",
            cure=f"use the directory that {before!r} was saved to (the parent that {last.name!r} "
            "was begun on), if you have it",
        )


def _rename_faults(record: StageRecord, old: str, new: str) -> list[str]:
    names = [stage.name for stage in record.stages]
    faults = []
    if old not in names:
        close = nearest(old, names)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        faults.append(f"there is no stage {old!r} in {' -> '.join(names)}{hint}")
    if new in names:
        faults.append(f"the chain already has a stage {new!r}")
    if new in record.left_out:
        faults.append(f"{new!r} is a stage that was left out of this chain")
    return faults + name_faults(new)


def _renamed(record: StageRecord, to: Mapping[str, str]) -> StageRecord:
    """The record with other names wherever stages are named."""

    def now(name: str) -> str:
        return to.get(name, name)

    return record.model_copy(
        update={
            "stages": tuple(s.model_copy(update={"name": now(s.name)}) for s in record.stages),
            "laminae": tuple(
                lamina.model_copy(
                    update={
                        "stage": now(lamina.stage),
                        "made_of": tuple(map(now, lamina.made_of)),
                    }
                )
                for lamina in record.laminae
            ),
            "saved_modules": {m: now(owner) for m, owner in record.saved_modules.items()},
            "biases": {bias: now(owner) for bias, owner in record.biases.items()},
            "token_rows": {
                table: {now(owner): rows for owner, rows in stages.items()}
                for table, stages in record.token_rows.items()
            },
        }
    )


def _rewrite(
    path: str | Path, where: dict[str, Any], files: AdapterFiles, staging: Path, record: StageRecord
) -> None:
    """Copy an adapter with another record; shards become one file, tensor by tensor the same."""
    if len(files.weights) > 1:
        file = read_adapter(path, **where)
        write_adapter(staging, file.config, file.tensors, {**file.metadata, **record.to_metadata()})
    else:
        strings = read_header(files.weights[0])[1]
        rewrite_strings(
            files.weights[0], staging / WEIGHTS_NAME, {**strings, **record.to_metadata()}
        )
    shutil.copyfile(files.config, staging / CONFIG_NAME)
