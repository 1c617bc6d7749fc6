"""What every byte of a merged model will be, before any is written."""

from __future__ import annotations

import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from lamina.checkpoint.stream.changes import Change, Changes
from lamina.checkpoint.stream.files import DTYPES, INDEX, ModelFiles, Stored, spelt
from lamina.checkpoint.stream.names import Naming, Unit

_ORDER = {name: position for position, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class Output:
    """One tensor of the result.

    Attributes:
        place: where it will be.
        source: what the base has under its name; None for a tensor that is new.
        name: in the model; "" if the model has no place for it.
    """

    place: Stored
    source: Stored | None
    name: str


@dataclass(frozen=True)
class Task:
    """Tensors of the result that are made together.

    Attributes:
        outputs: they.
        sources: what is read for them.
        unit: how files and model name them, where they are fused; None: one tensor, as it is.
        changes: name in the model -> what becomes of it; empty if they are copied.
        rows: the part of the model's tensor that they are, such as one expert; None: all of it.
    """

    outputs: tuple[Output, ...]
    sources: tuple[Stored, ...]
    unit: Unit | None
    changes: dict[str, Change]
    rows: slice | None = None

    @property
    def is_copy(self) -> bool:
        """Whether the bytes are those of the base."""
        first = self.outputs[0]
        same_dtype = bool(self.sources) and self.sources[0].dtype == first.place.dtype
        return not self.changes and self.unit is None and same_dtype


@dataclass(frozen=True)
class OutputFile:
    """A file of the result.

    Attributes:
        name: its name.
        header: its first bytes, up to the first tensor.
        size: its bytes.
        as_it_was: whether it is the base's file, byte for byte.
    """

    name: str
    header: bytes
    size: int
    as_it_was: bool


@dataclass(frozen=True)
class Plan:
    """A merge.

    Attributes:
        files: those of the result, in the order in which they are finished.
        tasks: what is done, in order.
        index: the text of the index; None if there is none, or it is the base's.
        keeps_index: whether the base's index is right as it is.
        dtype: of most of the weights.
        faults: why it can't be done tensor by tensor.
    """

    files: tuple[OutputFile, ...]
    tasks: tuple[Task, ...]
    index: str | None
    keeps_index: bool
    dtype: str
    faults: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """What all files take."""
        return sum(file.size for file in self.files)

    @property
    def changed(self) -> int:
        """How many tensors of the files change."""
        return sum(len(task.outputs) for task in self.tasks if task.changes)


def plan_of(files: ModelFiles, naming: Naming, changes: Changes, dtype: torch.dtype | None) -> Plan:
    """Lay out the result: the base's files, names and order, and new tensors beside what they tie.

    Args:
        files: the base's.
        naming: how they and the model name tensors.
        changes: what the adapter makes of the model's.
        dtype: of the result's floating-point weights; None keeps each as it is.
    """
    faults = [*naming.faults, *changes.faults]
    tasks: list[Task] = []
    for unit in naming.units:
        made, fault = _tasks(unit, files, changes, dtype)
        tasks += made
        faults += fault
    tasks += [_untouched(files.tensors[key], dtype) for key in naming.unused]
    new, lacking = _new(files, naming, changes, dtype)
    tasks += new
    faults += lacking
    placed = _laid_out(files, tasks)
    outputs = [output for task in placed for output in task.outputs]
    named = tuple(_file(files, name, placed) for name in files.names)
    index, keeps = _index(files, outputs)
    dtypes = Counter[str]()
    for output in outputs:
        if output.place.is_dense:
            dtypes[output.place.dtype] += prod(output.place.shape)
    most = str(DTYPES[dtypes.most_common(1)[0][0]]).removeprefix("torch.") if dtypes else "none"
    order = {file.name: position for position, file in enumerate(named)}
    placed.sort(key=lambda task: min((order[o.place.file], o.place.begin) for o in task.outputs))
    return Plan(named, tuple(placed), index, keeps, most, tuple(faults))


def _untouched(stored: Stored, dtype: torch.dtype | None) -> Task:
    output = Output(_as(stored, dtype), stored, "")
    return Task((output,), (stored,), None, {})


def _as(stored: Stored, dtype: torch.dtype | None) -> Stored:
    if dtype is None or not stored.is_dense:
        return stored
    return replace(stored, dtype=spelt(dtype))


def _tasks(
    unit: Unit, files: ModelFiles, changes: Changes, dtype: torch.dtype | None
) -> tuple[list[Task], list[str]]:
    sources = tuple(files.tensors[key] for key in unit.keys)
    found = {name: changes.values[name].change for name in unit.names if name in changes.values}
    wanted = {name: change for name, change in found.items() if change is not None}
    if not wanted:
        return [_untouched(source, dtype) for source in sources], []
    outputs = []
    for source in sources:
        place, name = _as(source, dtype), unit.names[0]
        if unit.load is None:
            place = replace(place, shape=changes.shapes[name])
        outputs.append(Output(place, source, name))
    task = Task(tuple(outputs), sources, unit if unit.load else None, wanted)
    return _apart(task, changes), list(_faults(sources, unit, changes))


def _apart(task: Task, changes: Changes) -> list[Task]:
    """A task for each expert, where one can be folded into after the other."""
    if task.unit is None or not task.unit.experts:
        return [task]
    name = task.unit.names[0]
    if task.changes[name].rows(changes.shapes[name]) != 1:
        return [task]
    outputs = {output.place.key: output for output in task.outputs}
    sources = {source.key: source for source in task.sources}
    return [
        Task(
            tuple(outputs[key] for key in expert.keys),
            tuple(sources[key] for key in expert.keys),
            expert,
            task.changes,
            slice(index, index + 1),
        )
        for index, expert in enumerate(task.unit.experts)
    ]


def _faults(sources: Iterable[Stored], unit: Unit, changes: Changes) -> Iterator[str]:
    for source in sources:
        if not source.is_dense:
            yield f"{source.key} is stored as {source.dtype}"
        here = changes.shapes[unit.names[0]]
        if unit.load is None and source.shape != here and not _grows(source.shape, here):
            yield f"{source.key} is {source.shape} in the files and {here} in the model"


def _grows(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return before[1:] == after[1:] and len(before) == len(after) and before[0] < after[0]


def _new(
    files: ModelFiles, naming: Naming, changes: Changes, dtype: torch.dtype | None
) -> tuple[list[Task], list[str]]:
    """Tensors that the result needs and the base lacks: those that are no longer tied."""
    units = {name: unit for unit in naming.units for name in unit.names}
    there = {changes.values[name].identity for name in units if name in changes.values}
    tasks: list[Task] = []
    faults = []
    for name, value in changes.values.items():
        if name in units or value.identity in there:
            continue
        mates = [
            n for n, b in changes.before.items() if b == changes.before.get(name) and n in units
        ]
        if name not in changes.before or not mates:
            faults.append(f"the base has no {name}")
            continue
        mate = units[mates[0]]
        source = files.tensors[mate.keys[0]]
        if mate.keys != mate.names:
            faults.append(f"what {name} is called in the base's files isn't sure")
            continue
        place = replace(_as(source, dtype), key=name, shape=changes.shapes[name])
        wanted = {} if value.change is None else {name: value.change}
        tasks.append(Task((Output(place, None, name),), (source,), None, wanted))
        there.add(value.identity)
    return tasks, faults


def _laid_out(files: ModelFiles, tasks: list[Task]) -> list[Task]:
    """The tasks with the place of each output in its file."""
    by_file: dict[str, list[Output]] = defaultdict(list)
    for task in tasks:
        for output in task.outputs:
            by_file[output.place.file].append(output)
    begins: dict[str, tuple[int, int]] = {}
    for name, outputs in by_file.items():
        if all(_keeps(output) for output in outputs):
            begins.update({o.place.key: (o.place.begin, o.place.end) for o in outputs})
            continue
        outputs.sort(key=lambda o: (-_ORDER.get(o.place.dtype, 0), o.place.key))
        at = len(_header(files, name, outputs))
        for output in outputs:
            size = _bytes(output.place)
            begins[output.place.key] = (at, at + size)
            at += size
    return [
        replace(task, outputs=tuple(_moved(output, begins) for output in task.outputs))
        for task in tasks
    ]


def _moved(output: Output, begins: dict[str, tuple[int, int]]) -> Output:
    begin, end = begins[output.place.key]
    return replace(output, place=replace(output.place, begin=begin, end=end))


def _keeps(output: Output) -> bool:
    source, place = output.source, output.place
    return source is not None and (source.dtype, source.shape) == (place.dtype, place.shape)


def _bytes(place: Stored) -> int:
    if place.dtype not in DTYPES:
        return place.end - place.begin
    return prod(place.shape) * place.torch_dtype.itemsize


def _header(files: ModelFiles, name: str, outputs: Iterable[Output]) -> bytes:
    """A safetensors header of these outputs, in this order.

    Source: https://huggingface.co/docs/safetensors (format)
    """
    entries: dict[str, Any] = {}
    if files.metadata[name]:
        entries["__metadata__"] = files.metadata[name]
    at = 0
    for output in outputs:
        size = _bytes(output.place)
        entries[output.place.key] = {
            "dtype": output.place.dtype,
            "shape": list(output.place.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _file(files: ModelFiles, name: str, tasks: list[Task]) -> OutputFile:
    here = [(task, o) for task in tasks for o in task.outputs if o.place.file == name]
    path = files.directory / name
    if all(_keeps(output) for _, output in here):
        begin = min((o.place.begin for _, o in here), default=path.stat().st_size)
        with path.open("rb") as opened:
            header = opened.read(begin)
        same = all(task.is_copy for task, _ in here)
        return OutputFile(name, header, path.stat().st_size, same)
    outputs = sorted((output for _, output in here), key=lambda o: o.place.begin)
    return OutputFile(name, _header(files, name, outputs), outputs[-1].place.end, False)


def _index(files: ModelFiles, outputs: list[Output]) -> tuple[str | None, bool]:
    """(the text of a new index, whether the old one is right)."""
    if not files.index:
        return None, False
    if all(_keeps(output) for output in outputs):
        return None, True
    old = json.loads((files.directory / INDEX).read_text(encoding="utf-8"))
    metadata = dict(old.get("metadata") or {})
    metadata["total_size"] = sum(output.place.end - output.place.begin for output in outputs)
    if "total_parameters" in metadata:
        more = [prod(o.place.shape) - (prod(o.source.shape) if o.source else 0) for o in outputs]
        metadata["total_parameters"] += sum(more)
    weight_map = {output.place.key: output.place.file for output in outputs}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    return text + "\n", False
