"""Carry out the plan of a merge: read, fold, write, a block of rows at a time."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from lamina.checkpoint.stream.changes import Folded
from lamina.checkpoint.stream.files import Reader, raw
from lamina.checkpoint.stream.plan import Output, Plan, Task
from lamina.checkpoint.stream.restart import Unfinished
from lamina.errors import CheckpointError, FoldError

# One reads or writes while the other computes.
_WORKERS = 2
_AHEAD = 2 * _WORKERS
_CHUNK = 2**25
_CAST_ROWS_OF = 2**22

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One step.

    Attributes:
        files: that it writes into.
        size: bytes that it writes.
        do: does it.
    """

    files: tuple[str, ...]
    size: int
    do: Callable[[], None]


class _Writer:
    """The files of the result, open to be written into."""

    def __init__(self, place: Unfinished, plan: Plan, reader: Reader) -> None:
        self.place, self.reader = place, reader
        self.open: dict[str, int] = {}
        for file in plan.files:
            if file.name not in place.done:
                self.open[file.name] = self._begin(place.model / file.name, file.size)
                os.pwrite(self.open[file.name], file.header, 0)

    def _begin(self, path: Path, size: int) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        os.ftruncate(descriptor, size)
        return descriptor

    def wants(self, output: Output) -> bool:
        """Whether the file isn't finished yet."""
        return output.place.file in self.open

    def write(self, output: Output, tensor: torch.Tensor, row: int = 0) -> None:
        """Put a tensor, or some rows of it, where it belongs."""
        place = output.place
        held, at = raw(tensor), place.begin
        if row:
            at += row * ((place.end - place.begin) // place.shape[0])
        while held:
            written = os.pwrite(self.open[place.file], held[:_CHUNK], at)
            held, at = held[written:], at + written

    def copy(self, task: Task) -> None:
        """Let the system copy the bytes; they never come here."""
        source, place = task.sources[0], task.outputs[0].place
        given, made = self.reader.descriptor(source.file), self.open[place.file]
        done, size = 0, source.end - source.begin
        while done < size:
            done += _copy(given, made, source.begin + done, place.begin + done, size - done)

    def close(self) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)
        self.open = {}


def _copy(given: int, made: int, begin: int, at: int, size: int) -> int:
    copy_range = getattr(os, "copy_file_range", None)
    if copy_range is not None:
        try:
            copied: int = copy_range(given, made, min(size, 2**30), begin, at)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        else:
            if copied:
                return copied
    chunk = os.pread(given, min(size, _CHUNK), begin)
    if not chunk:
        raise CheckpointError(
            "A file of the base ended while it was copied.",
            cure="leave the base alone while it is merged; then merge again",
        )
    return os.pwrite(made, chunk, at)


def run(plan: Plan, source: Path, place: Unfinished, told: Told | None = None) -> None:
    """Write the files of a plan that are not finished yet.

    Args:
        plan: what they will be.
        source: the base's directory.
        place: where they are written.
        told: called with bytes that are done and bytes in all.

    Raises:
        FoldError: NaN or infinity would come out.
        CheckpointError: the disk is full, or the base changes meanwhile.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(Reader(source))
        # Opened by one thread.
        for file in plan.files:
            reader.descriptor(file.name)
        writer = _Writer(place, plan, reader)
        stack.callback(writer.close)
        try:
            _work(plan, writer, reader, place, told)
        except OSError as error:
            if isinstance(error, CheckpointError) or error.errno not in (
                errno.ENOSPC,
                errno.EDQUOT,
            ):
                raise
            raise CheckpointError(
                f"No space left while writing into '{place.directory}'.",
                faults=[f"{len(place.done)} of {len(plan.files)} files are finished, and kept"],
                cure="free some space, then run the same merge again: it goes on from there",
            ) from error


def _work(
    plan: Plan, writer: _Writer, reader: Reader, place: Unfinished, told: Told | None
) -> None:
    jobs = list(_jobs(plan, writer, reader))
    with ThreadPoolExecutor(_WORKERS) as pool, ThreadPoolExecutor(1) as syncing:
        tally = _Tally(plan, place, jobs, syncing)
        for job in _carried_out(pool, jobs):
            tally.note(job)
            if told is not None:
                told(tally.bytes, plan.bytes)
        tally.wait()


class _Tally:
    """What is left to do; a file of which nothing is left goes to the disk, and is finished."""

    def __init__(self, plan: Plan, place: Unfinished, jobs: list[Job], pool: Executor) -> None:
        self.place, self.pool = place, pool
        self.bytes = sum(file.size for file in plan.files if file.name in place.done)
        self.left = Counter(name for job in jobs for name in job.files)
        empty = [f.name for f in plan.files if f.name not in place.done and not self.left[f.name]]
        self.syncing = [pool.submit(place.finish, name) for name in empty]

    def note(self, job: Job) -> None:
        """Something is done."""
        self.bytes += job.size
        self.left.subtract(job.files)
        self.syncing += [
            self.pool.submit(self.place.finish, name) for name in job.files if not self.left[name]
        ]

    def wait(self) -> None:
        """Until all is on the disk."""
        for future in self.syncing:
            future.result()


def _carried_out(pool: Executor, jobs: list[Job]) -> Iterator[Job]:
    """Each job when it is done; few are under way at a time, and at an error no more begin."""
    running: dict[Future[None], Job] = {}
    try:
        for job in jobs:
            running[pool.submit(job.do)] = job
            if len(running) >= _AHEAD:
                yield from _done(running)
        while running:
            yield from _done(running)
    finally:
        for future in running:
            future.cancel()


def _done(running: dict[Future[None], Job]) -> Iterator[Job]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        job = running.pop(future)
        future.result()
        yield job


def _jobs(plan: Plan, writer: _Writer, reader: Reader) -> Iterator[Job]:
    """All there is to do, in order."""
    for task in plan.tasks:
        wanted = tuple(output for output in task.outputs if writer.wants(output))
        if not wanted:
            continue
        files = tuple({output.place.file for output in wanted})
        size = sum(output.place.end - output.place.begin for output in wanted)
        if task.is_copy:
            yield Job(files, size, _bound(writer.copy, task))
            continue
        blocks = list(_blocks(task))
        for rows in blocks:
            yield Job(files, size // len(blocks), _bound(_block, task, rows, writer, reader))
        if not blocks:
            yield Job(files, size, _bound(_whole, task, writer, reader))


def _bound(function: Callable[..., None], *args: object) -> Callable[[], None]:
    return lambda: function(*args)


def _blocks(task: Task) -> Iterable[slice]:
    """The rows that can be made one block after another; none: all at once."""
    output = task.outputs[0]
    shape = output.place.shape
    if task.unit is not None or output.source is None or not shape:
        return
    if task.changes:
        change = task.changes[output.name]
        step = change.rows(output.source.shape) if output.source.shape == shape else None
    else:
        # Only the dtype is another.
        step = max(1, _CAST_ROWS_OF * shape[0] // max(1, torch.Size(shape).numel()))
    if step is not None:
        for begin in range(0, shape[0], step):
            yield slice(begin, min(begin + step, shape[0]))


@torch.no_grad()
def _block(task: Task, rows: slice, writer: _Writer, reader: Reader) -> None:
    output = task.outputs[0]
    dtype = output.place.torch_dtype
    value = reader.read(task.sources[0], rows)
    if task.changes:
        change = task.changes[output.name]
        assert isinstance(change, Folded)
        value = _finite(change.part(value, rows, dtype), output)
    writer.write(output, value.to(dtype), rows.start)


@torch.no_grad()
def _whole(task: Task, writer: _Writer, reader: Reader) -> None:
    read = {stored.key: reader.read(stored) for stored in task.sources}
    if task.unit is None:
        output = task.outputs[0]
        value = next(iter(read.values()))
        dtype = output.place.torch_dtype
        change = task.changes.get(output.name)
        made = value.to(dtype) if change is None else _finite(change.of(value, dtype), output)
        writer.write(output, made)
        return
    assert task.unit.load is not None
    assert task.unit.save is not None
    inside = task.unit.load(read)
    del read
    for name, change in task.changes.items():
        dtype = task.outputs[0].place.torch_dtype
        value = inside[name]
        if task.rows is not None and isinstance(change, Folded):
            value = change.part(value, task.rows, dtype)
        else:
            value = change.of(value, dtype)
        inside[name] = _finite(value, task.outputs[0])
    back = task.unit.save(inside)
    for output in task.outputs:
        if writer.wants(output):
            writer.write(output, back[output.place.key].to(output.place.torch_dtype))


def _finite(tensor: torch.Tensor, output: Output) -> torch.Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise FoldError(
            "NaN or Inf would come out; nothing was saved.",
            faults=[output.place.key],
            cure="look for the adapter that is broken; train it again with a lower learning rate",
        )
    return tensor
