"""What an examination has read of an adapter directory; None stands for what can't be read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.record import Base, StageRecord
from lamina.config import LoraConfig

if TYPE_CHECKING:
    from lamina.checkpoint.doctor.base import BaseModel
    from lamina.checkpoint.doctor.measure import Measures


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, told from the header.

    Attributes:
        key: its name in the file.
        file: the file.
        dtype: as safetensors names it, such as "BF16".
        shape: its shape.
        begin: its first byte in the file, counted from the end of the header.
        end: the byte after its last one.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Entries:
    """What lies in the directory and in the folders in it.

    Attributes:
        files: name -> bytes; a file that can't be looked at has -1.
        folders: name -> the names of the files in it.
        siblings: hidden directories beside it, left over from saves that were cut off.
    """

    files: Mapping[str, int]
    folders: Mapping[str, tuple[str, ...]]
    siblings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """All that was read.

    Attributes:
        directory: that it was read from.
        entries: the names in it.
        config: the values in `adapter_config.json`.
        settings: the config that they make.
        tensors: plain name -> tensor; plain names have no wrappers' parts and adapter names.
        metadata: the strings in the headers.
        contents: the tensors, sorted by what they are.
        record: the stage record; None also if there is none.
        measures: what the values of the tensors are like.
        base: the base model; None also if none was given.
        target: the program that it is to be served by, such as "vllm"; "" for none.
    """

    directory: Path
    entries: Entries | None = None
    config: dict[str, Any] | None = None
    settings: LoraConfig | None = None
    tensors: Mapping[str, StoredTensor] | None = None
    metadata: Mapping[str, str] | None = None
    contents: Contents | None = None
    record: StageRecord | None = None
    measures: Measures | None = None
    base: BaseModel | None = None
    target: str = ""

    @property
    def recorded_base(self) -> Base:
        """The base that the record tells of; an empty one if there is no record."""
        return self.record.newest.base if self.record else Base()

    @property
    def chain(self) -> Mapping[str, Mapping[str, slice]]:
        """Plain module name -> stage that trained them last -> its ranks in the file."""
        spans: dict[str, dict[str, slice]] = defaultdict(dict)
        begun: dict[str, int] = defaultdict(int)
        for lamina in self.record.laminae if self.record else ():
            for module, rank in lamina.ranks.items():
                spans[module][lamina.stage] = slice(begun[module], begun[module] + rank)
                begun[module] += rank
        return dict(spans)
