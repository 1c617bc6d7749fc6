"""Where the examples of one entry of `datasets` come from, as rows that can be read again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lamina.errors import DataError
from lamina.extras import require
from lamina.training.data.files import find_files
from lamina.training.data.hub import find_builder, open_split
from lamina.training.data.reading import Row, read_rows
from lamina.training.plan.settings import Data

_LOOKED_AT = 100


@dataclass(frozen=True)
class Source:
    """Data that is there; reading it begins anew with each call.

    Attributes:
        data: the entry of the plan.
        files: local ones, in their order.
        builder: of a hub dataset.
        digest: SHA-256 of the files' bytes, or of a hub name with its commit.
        part: the first row, and the one after the last, of a split such as "train[:90%]".
    """

    data: Data
    files: tuple[Path, ...]
    builder: Any
    digest: str
    part: tuple[int, int | None] = (0, None)

    def rows(self) -> Iterator[Row]:
        """All rows that are asked for, with their places, broken ones too."""
        first, last = self.part
        if self.data.max_samples is not None:
            end = first + self.data.max_samples
            last = end if last is None else min(end, last)
        yield from islice(self._all(), first, last)

    def first(self, count: int = _LOOKED_AT) -> list[dict[str, Any]]:
        """The first rows that aren't broken."""
        return [row for _, row in islice(self.rows(), count) if isinstance(row, dict)]

    def _all(self) -> Iterator[Row]:
        if self.builder is not None:
            split, streaming = self.data.split, self.data.streaming
            opened = open_split(self.builder, self.data.path, split, streaming)
            yield from ((f"row {number}", row) for number, row in enumerate(opened, 1))
            return
        for file in self.files:
            named = f"{file.name}, " if len(self.files) > 1 else ""
            yield from ((f"{named}{place}", row) for place, row in read_rows(file))


def open_data(data: Data, root: str | os.PathLike[str] = ".") -> Source:
    """Find data: a local file, folder or pattern, else a dataset of the hub.

    Args:
        data: an entry of `datasets`.
        root: the folder of the plan's file. A relative path is looked for there first, then in the
            working directory.

    Raises:
        DataError: nothing is there, or nothing that is data.
    """
    files = find_files(data.path, data.split, Path(root))
    if files is None:
        builder = find_builder(data.path, data.name, data.revision)
        told = "\n".join([data.path, data.name or "", data.split, str(builder.hash)])
        return Source(data, (), builder, hashlib.sha256(told.encode()).hexdigest())
    _check_local(data)
    source = Source(data, tuple(files), None, _digest(files))
    return _sliced(source)


def _check_local(data: Data) -> None:
    told = [
        f"{key}: {value!r} is for datasets of the hub, and this is local"
        for key, value in (("name", data.name), ("revision", data.revision))
        if value is not None
    ]
    if "+" in data.split:
        told.append(f"split: {data.split!r}: only one split of local data is taken")
    if data.streaming and "[" in data.split:
        told.append(f"split: {data.split!r}: streaming data can't be sliced; max_samples can be")
    if told:
        raise DataError(f"{data.path} can't be opened as asked.", faults=told)


def _sliced(source: Source) -> Source:
    """With the part that the split's slice means, by the rules of `datasets`."""
    split = source.data.split
    if "[" not in split:
        return source
    datasets = require("datasets", "train")
    name = split.partition("[")[0]
    count = sum(1 for _ in source._all())
    try:
        part = datasets.ReadInstruction.from_spec(split).to_absolute({name: count})[0]
    except (ValueError, AssertionError) as error:
        raise DataError(f"{source.data.path} has no split {split!r}: {error}.") from error
    first = part.from_ or 0
    last = count if part.to is None else part.to
    return Source(source.data, source.files, None, source.digest, (first, last))


def _digest(files: list[Path]) -> str:
    """SHA-256 of the SHA-256 of each file, in their order."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            whole.update(_sha(opened))
    return whole.hexdigest()


def _sha(opened: Any) -> bytes:
    digest = hashlib.sha256()
    while block := opened.read(1 << 20):
        digest.update(block)
    return digest.digest()
