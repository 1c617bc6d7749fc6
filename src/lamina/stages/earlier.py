"""A chain as it was when one of its earlier stages was saved, from the file of a later one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lamina.checkpoint.adapter import AdapterFile, read_adapter
from lamina.checkpoint.chain import makers_of
from lamina.checkpoint.record import StageRecord, read_record
from lamina.errors import LaminaError, StageError, nearest
from lamina.stages.assembling import adapter_of
from lamina.stages.configs import scaling_of
from lamina.stages.lamination import Chain, take_apart
from lamina.stages.selection import select


def earlier(file: AdapterFile, stage: str) -> AdapterFile:
    """The chain up to and including a stage, as that stage left it.

    It is taken from the file's own ranks. Where later stages have trained these on, or have
    replaced what it trained whole, from the directory of that name beside the file's, if its record
    says that this chain was built on it.

    Args:
        file: the adapter of the end of the chain.
        stage: the name of one of its stages.

    Raises:
        StageError: there is no such stage, or it is in neither place as it was.
    """
    record = file.record()
    names = [each.name for each in record.stages]
    if stage not in names:
        close = nearest(stage, names)
        raise StageError(
            f"{file.source} has no stage {stage!r}.",
            faults=[f"its stages are {' -> '.join(names)}"],
            cure=f"choose {(close[0] if close else names[-1])!r}",
        )
    if stage == names[-1]:
        return file
    why = _why_not_in(record, stage)
    if why is None:
        chain = take_apart(file)
        try:
            return _beginning(file, chain, stage)
        except StageError as error:
            why = "; ".join([error.what, *error.faults[:1]])
    beside = Path(file.source).expanduser().resolve().parent / stage
    found, why_not = _beside(beside, record, stage)
    if found is not None:
        return found
    raise StageError(
        f"{file.source} no longer has {stage!r} as it was saved: {why}.",
        faults=[why_not],
        cure=f"give the directory that {stage!r} was saved to",
    )


def _why_not_in(record: StageRecord, stage: str) -> str | None:
    """Why the ranks in a file aren't those that a stage left; None if they are."""
    for lamina, makers in zip(record.laminae, makers_of(record), strict=True):
        if stage not in makers:
            continue
        if len(lamina.made_of) > 1:
            return "it was flattened together with others"
        later = makers[makers.index(stage) + 1 :]
        return f"{' and '.join(map(repr, later))} trained its ranks on" if later else None
    return "its record doesn't say which ranks it trained"


def _beginning(file: AdapterFile, chain: Chain, stage: str) -> AdapterFile:
    """The first laminae of a chain, up to those of a stage.

    Raises:
        StageError: they are not what they were.
    """
    makers = makers_of(chain.record)
    end = next(place for place, names in enumerate(makers) if stage in names)
    selection = select(chain, range(end + 1))
    if selection.overwritten:
        raise StageError("later stages have trained over it", faults=selection.overwritten)
    newest = selection.chain.parts[-1].config
    made = adapter_of(file, chain, selection, newest, scaling_of(newest, ""))
    metadata = {**file.metadata, **selection.chain.record.to_metadata()}
    return replace(made, source=f"{file.source}#{stage}", metadata=metadata)


def _beside(directory: Path, record: StageRecord, stage: str) -> tuple[AdapterFile | None, str]:
    """The adapter of a stage in a directory of its own, and why it isn't there."""
    if not directory.is_dir():
        return None, f"there is no {directory} beside it"
    try:
        file = read_adapter(directory)
        other = read_record(file.metadata, source=file.source)
    except LaminaError as error:
        return None, f"{directory} can't be read: {error.what}"
    length = [each.name for each in record.stages].index(stage) + 1
    if other is None or _told(other) != _told(record)[:length]:
        return None, f"{directory} is of another chain: this one wasn't built on it"
    return file, ""


def _told(record: StageRecord) -> list[tuple[Any, ...]]:
    """What tells a chain from another one that has stages of the same names."""
    return [(each.name, each.mode, each.created, each.probe) for each in record.stages]
