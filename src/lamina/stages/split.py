"""Each stage of a chain as an adapter of its own again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.checkpoint.adapter import AdapterFile, read_adapter
from lamina.checkpoint.chain import makers_of
from lamina.checkpoint.record import StageRecord
from lamina.errors import StageError
from lamina.stages.assembling import no_stages, own_adapter, write_stage
from lamina.stages.lamination import Chain, take_apart
from lamina.stages.names import name_faults
from lamina.stages.selection import Selection, select
from lamina.storage.atomic import atomic_directory
from lamina.storage.companions import copy_tokenizer
from lamina.storage.destination import check_destination


@dataclass(frozen=True)
class StagePart:
    """What was saved of one stage.

    Attributes:
        stage: its name, and the folder's.
        path: the directory.
        made_by: the stages that trained its ranks, oldest first; it has the last one's values.
        ranks: the smallest and the largest rank.
        modules: how many modules have ranks.
        scaling: the different scalings in it.
        saved_modules: modules trained whole that are in it.
        biases: how many biases are.
        rows: how many replaced rows of tables are.
        parameters: entries of all its tensors.
        left_out: the stages below, on which it was trained.
        notes: what is to be known beside that, a line each.
    """

    stage: str
    path: str
    made_by: tuple[str, ...]
    ranks: tuple[int, int]
    modules: int
    scaling: tuple[float, ...]
    saved_modules: tuple[str, ...]
    biases: int
    rows: int
    parameters: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SplitReport:
    """What was saved.

    Attributes:
        path: the directory, with a folder for each part.
        parts: the adapters, oldest first; their sum is the chain.
        tokenizer: the files of a tokenizer that were copied beside each.
    """

    path: str
    parts: tuple[StagePart, ...]
    tokenizer: tuple[str, ...]


def split(path: str | Path, out: str | Path, **where: Any) -> SplitReport:
    """Write each stage's ranks as a plain adapter, with the config that they were trained with.

    All of them active together compute what the chain does. The newest stage's factors are the
    file's, bit for bit; B of older ones comes back within one unit in the last place of fp32.
    Ranks that were continued are the last trainer's. Modules trained whole, biases and rows go to
    the stage whose values the file has. Works on files alone.

    Args:
        path: a stage's directory, any plain PEFT adapter, or a hub id.
        out: a directory that is empty or not there; each stage gets a folder in it.
        where: `subfolder` and hub options of `path`.

    Raises:
        StageError: a stage's name is no folder's, or biases can't be told apart.
        CheckpointError: files are missing or broken, or `out` has files already.
    """
    place = check_destination(out, [path])
    file = read_adapter(path, **where)
    check_destination(out, [file.source])
    chain = take_apart(file)
    names = [part.lamina.stage for part in chain.parts]
    _check_names(names, file.source)
    selections = [select(chain, [index], sums_apart=True) for index in range(len(names))]
    files = [own_adapter(file, chain, selection) for selection in selections]
    with atomic_directory(place) as staging:
        tokenizer: tuple[str, ...] = ()
        for name, selection, own in zip(names, selections, files, strict=True):
            write_stage(staging / name, own, selection.chain.record)
            tokenizer = copy_tokenizer(file.source, staging / name)
    summed = _summed_biases(chain)
    parts = [
        _part(place, file, chain, index, selection, own, summed)
        for index, (selection, own) in enumerate(zip(selections, files, strict=True))
    ]
    return SplitReport(str(place), tuple(parts), tokenizer)


def _check_names(names: Sequence[str], source: str) -> None:
    faults = [fault for name in names for fault in name_faults(name)]
    folded: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folded[name.casefold()].append(name)
    faults += [
        f"{' and '.join(map(repr, alike))} are one folder where case doesn't count"
        for alike in folded.values()
        if len(alike) > 1
    ]
    if faults:
        raise StageError(
            f"The stages of {source} can't become folders by their names.",
            faults=faults,
            cure="give them other names first: lamina edit DIR --rename OLD=NEW",
        )


def _summed_biases(chain: Chain) -> dict[str, int]:
    """Stage -> in how many modules its bias of B is the sum with those of older stages."""
    found: dict[str, int] = defaultdict(int)
    for module in {module for part in chain.parts for module in part.factors}:
        biased = [p for p in chain.parts if module in p.factors and p.config.lora_bias]
        if len(biased) > 1:
            found[biased[-1].lamina.stage] += 1
    return found


def _part(
    place: Path,
    file: AdapterFile,
    chain: Chain,
    index: int,
    selection: Selection,
    own: AdapterFile,
    summed: dict[str, int],
) -> StagePart:
    (part,) = selection.chain.parts
    record, name = selection.chain.record, part.lamina.stage
    ranks = [whole.rank for whole in part.factors.values()]
    rows = [row for stages in record.token_rows.values() for its in stages.values() for row in its]
    return StagePart(
        stage=name,
        path=str(place / name),
        made_by=makers_of(chain.record)[index],
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        modules=len(ranks),
        scaling=tuple(sorted({whole.scaling for whole in part.factors.values()})),
        saved_modules=tuple(record.saved_modules),
        biases=len(record.biases),
        rows=len(rows),
        parameters=sum(tensor.numel() for tensor in own.tensors.values()),
        left_out=record.left_out,
        notes=(*_notes(chain, index, selection, summed), *_file_notes(file, own, record)),
    )


def _file_notes(file: AdapterFile, own: AdapterFile, record: StageRecord) -> Iterator[str]:
    along = no_stages(own, record)
    if along:
        yield f"has no record: {', '.join(along[:4])} is the base's, and no stage's"
    if file.config.task_type is not None and own.config.task_type is None:
        yield "task_type is left out, since its head is another stage's: load that one after this"


def _notes(chain: Chain, index: int, selection: Selection, summed: dict[str, int]) -> Iterator[str]:
    makers, name = makers_of(chain.record)[index], chain.parts[index].lamina.stage
    if len(makers) > 1:
        yield f"has {name}'s values of the ranks that {', '.join(makers[:-1])} trained before"
    yield from selection.overwritten
    if name in summed:
        yield f"the biases of B are the sum with older stages' in {summed[name]} module(s)"
