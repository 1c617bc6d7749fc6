"""A model's safetensors files, read by position: nothing is mapped, so nothing stays resident."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lamina.checkpoint.header import data_start, read_header
from lamina.errors import CheckpointError, MissingFileError
from lamina.storage.shards import shard_names

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# In the order in which safetensors lays tensors out, widest last here and first there.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_SPELT = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        key: its name.
        file: the file's name in its directory.
        dtype: as safetensors spells it.
        shape: its shape.
        begin: where its bytes begin in the file.
        end: where they end.
    """

    key: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype, as torch has it."""
        return DTYPES[self.dtype]

    @property
    def is_dense(self) -> bool:
        """Whether it holds floating-point numbers that sums can be rounded to."""
        dtype = DTYPES.get(self.dtype)
        return dtype is not None and dtype.is_floating_point and dtype.itemsize >= 2


def spelt(dtype: torch.dtype) -> str:
    """A dtype as safetensors spells it."""
    return _SPELT[dtype]


@dataclass(frozen=True)
class ModelFiles:
    """The weights of a model directory.

    Attributes:
        directory: where they lie.
        names: the safetensors files, sorted.
        index: whether there is an index.
        tensors: name -> where it is.
        metadata: file -> the strings of its header.
        headers: file -> SHA-256 of its header.
    """

    directory: Path
    names: tuple[str, ...]
    index: bool
    tensors: dict[str, Stored]
    metadata: dict[str, dict[str, str]]
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What all files take."""
        return sum((self.directory / name).stat().st_size for name in self.names)


def model_files(directory: Path) -> ModelFiles:
    """Find and check the weights of a model, by the headers of its files alone.

    Raises:
        MissingFileError: there are none as safetensors, or a shard is missing.
        CheckpointError: an index names files elsewhere, or a file is cut off, or its header is
            none, or a tensor is in two files, or in none.
    """
    names, index = _names(directory)
    _refuse_missing(directory, names)
    tensors: dict[str, Stored] = {}
    metadata, digests = {}, {}
    faults: list[str] = []
    for name in names:
        header, metadata[name] = read_header(directory / name)
        start = data_start(directory / name)
        with (directory / name).open("rb") as opened:
            digests[name] = hashlib.sha256(opened.read(start)).hexdigest()
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            stored = Stored(
                key, name, entry["dtype"], tuple(entry["shape"]), start + begin, start + end
            )
            faults += _faults(stored, start, tensors.get(key))
            tensors[key] = stored
    if faults:
        raise CheckpointError(
            f"The weights in '{directory}' contradict themselves.",
            faults=faults[:8],
            cure="save or download the model again",
        )
    return ModelFiles(directory, tuple(names), index, tensors, metadata, digests)


def _names(directory: Path) -> tuple[list[str], bool]:
    if (directory / SINGLE).is_file():
        return [SINGLE], False
    if (directory / INDEX).is_file():
        return shard_names(directory / INDEX, str(directory / INDEX)), True
    raise MissingFileError(
        f"There is neither {SINGLE} nor {INDEX} in '{directory}'.",
        cure="give the directory of a model saved as safetensors",
    )


def _refuse_missing(directory: Path, names: list[str]) -> None:
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise MissingFileError(
            f"'{directory}' has {len(names) - len(missing)} of the {len(names)} shards that "
            f"{INDEX} names.",
            faults=[f"'{name}' is missing" for name in missing],
            cure="copy or download the missing files",
        )


def _faults(stored: Stored, start: int, other: Stored | None) -> Iterator[str]:
    if other is not None:
        yield f"{stored.key} is in {other.file} and in {stored.file}"
    if stored.dtype not in DTYPES:
        return
    count = 1
    for size in stored.shape:
        count *= size
    takes = count * stored.torch_dtype.itemsize
    if stored.begin < start or stored.end - stored.begin != takes:
        yield f"{stored.key} has {stored.end - stored.begin:,} bytes, its shape takes {takes:,}"


class Reader:
    """Tensors of a directory, each read into memory of its own when it is asked for.

    Threads may share one.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def descriptor(self, file: str) -> int:
        """The open file of that name."""
        if file not in self._open:
            self._open[file] = os.open(self._directory / file, os.O_RDONLY)
        return self._open[file]

    def read(self, stored: Stored, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or some of its rows."""
        shape, begin, end = stored.shape, stored.begin, stored.end
        if rows is not None:
            row = (end - begin) // shape[0]
            begin, end = begin + rows.start * row, begin + rows.stop * row
            shape = (rows.stop - rows.start, *shape[1:])
        held = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(stored, held.numpy().data, begin)
        return held.view(stored.torch_dtype).view(shape)

    def _fill(self, stored: Stored, held: memoryview, begin: int) -> None:
        descriptor = self.descriptor(stored.file)
        done = 0
        while done < len(held):
            got = os.preadv(descriptor, [held[done:]], begin + done)
            if got == 0:
                raise CheckpointError(
                    f"'{self._directory / stored.file}' ended while {stored.key} was read.",
                    cure="leave the base alone while it is merged; then merge again",
                )
            done += got


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
