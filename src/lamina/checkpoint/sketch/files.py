"""The weights of a base in safetensors files, sampled without loading them; no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lamina.checkpoint.header import data_start, read_header
from lamina.checkpoint.sketch.layout import names_as_loaded
from lamina.checkpoint.sketch.sampling import Tensor, sketch
from lamina.errors import CheckpointError, LaminaError, MissingFileError
from lamina.storage.shards import shard_names
from lamina.storage.untrusted import read_json

if TYPE_CHECKING:
    from lamina.checkpoint.record import Sketch
    from lamina.checkpoint.sketch.stored import Floats, Positions

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_STORED = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
# Positions no further apart are read in one go.
_NEAR = 256


def sketch_files(directory: str | Path) -> Sketch:
    """What the weights in a model's directory look like, without loading them.

    Their names are those that they have in the model, as far as its class can be built.

    Raises:
        MissingFileError: it has no safetensors files.
        CheckpointError: they can't be read.
    """
    weights = FileWeights(directory)
    return sketch(weights.as_loaded() or weights)


class FileWeights:
    """The weights in a model's directory; the source is `sampling.Weights`.

    Args:
        directory: with `model.safetensors`, or its shards and their index.
        renamed: names in the files -> names in the model, and nothing for what is put together
            otherwise there; None takes the names as they are.

    Raises:
        MissingFileError: there are no such files.
        CheckpointError: they can't be read.
    """

    # What is put together otherwise in the model has another name, or none.
    whole = False
    aliases: Mapping[str, str] = {}

    def __init__(
        self,
        directory: str | Path,
        renamed: Callable[[Iterable[str]], Mapping[str, str]] | None = None,
    ) -> None:
        self.directory = Path(directory).expanduser()
        stored: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
        for file in _files(self.directory):
            header, _ = read_header(file)
            start = data_start(file)
            stored.update({name: (file, start, entry) for name, entry in header.items()})
        self._renamed = renamed is not None
        names = {name: name for name in stored} if renamed is None else renamed(stored)
        self._stored = {names[name]: where for name, where in stored.items() if name in names}

    def as_loaded(self) -> FileWeights | None:
        """The same by the names in the model; None if they are, or can't be known."""
        if self._renamed:
            return None
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        names = names_as_loaded(self.directory, shapes)
        return None if names is None else FileWeights(self.directory, lambda _: names)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Name -> tensor; values that aren't stored as floating point can't be had."""
        return {name: _tensor(entry) for name, (_, _, entry) in self._stored.items()}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`config.json`; empty if there is none that can be read."""
        try:
            found = read_json(self.directory / "config.json")
        except (LaminaError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def quantization(self) -> str | None:
        """The quantiser that the config names."""
        settings = self.config.get("quantization_config")
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        return method if isinstance(method, str) else None

    def read(self, wanted: Mapping[str, Positions]) -> dict[str, Floats]:
        """The values of these tensors at flat positions, as float32."""
        found = {}
        opened: dict[Path, int] = {}
        try:
            for name, positions in wanted.items():
                file, start, entry = self._stored[name]
                if file not in opened:
                    opened[file] = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                begin = start + int(entry["data_offsets"][0])
                dtype = self.tensors[name].dtype
                found[name] = _values(opened[file], begin, str(dtype), positions)
        finally:
            for descriptor in opened.values():
                os.close(descriptor)
        return found


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file():
        return [directory / name for name in shard_names(index, str(index))]
    if not (directory / _SINGLE).is_file():
        raise MissingFileError(
            f"There is no {_SINGLE} in {directory}, nor an index of shards.",
            cure="save the model with save_pretrained, which writes safetensors files",
        )
    return [directory / _SINGLE]


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    shape, dtype = tuple(entry["shape"]), _DTYPES.get(str(entry["dtype"]))
    begin, end = entry["data_offsets"]
    whole = (
        dtype is not None and end - begin == math.prod(shape) * np.dtype(_STORED[dtype]).itemsize
    )
    return Tensor(shape, dtype, readable=whole)


def _values(descriptor: int, begin: int, dtype: str, positions: Positions) -> Floats:
    kind = np.dtype(_STORED[dtype])
    values = np.empty(len(positions), kind)
    # Windows are runs of neighbours.
    breaks = np.flatnonzero(np.abs(np.diff(positions)) > _NEAR) + 1
    for run in np.split(np.arange(len(positions)), breaks):
        low, high = int(positions[run].min()), int(positions[run].max())
        wanted = (high + 1 - low) * kind.itemsize
        raw = _read_at(descriptor, wanted, begin + low * kind.itemsize)
        if len(raw) < wanted:
            raise CheckpointError("A file of the base ends before its tensors do.")
        values[run] = np.frombuffer(raw, kind)[positions[run] - low]
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def _read_at(descriptor: int, length: int, offset: int) -> bytes:
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, length)
