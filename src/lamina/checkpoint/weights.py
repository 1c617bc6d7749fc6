"""A model's weights on disk, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lamina.checkpoint.header import read_header
from lamina.errors import CheckpointError, MissingFileError
from lamina.storage.shards import shard_names

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class WeightsOnDisk(Mapping[str, torch.Tensor]):
    """name -> tensor of a directory with `model.safetensors`, whole or in shards.

    A tensor is read when it is asked for, and kept by nobody; the file it is in stays open until
    one in another file is asked for.

    Args:
        directory: as transformers saves a model.

    Raises:
        CheckpointError: there are no such weights, or a shard is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        self._files: dict[str, Path] = {}
        self._opened: tuple[Path, Any] | None = None
        for path in self._shards():
            header, _ = read_header(path)
            twice = sorted(header.keys() & self._files.keys())
            if twice:
                raise CheckpointError(
                    f"{len(twice)} tensor(s) are in '{path.name}' and in another file.",
                    faults=twice[:8],
                    cure="save or download the model again; the files contradict each other",
                )
            self._files.update(dict.fromkeys(header, path))

    def _shards(self) -> list[Path]:
        single, index = self.directory / _SINGLE, self.directory / _INDEX
        if single.is_file():
            return [single]
        if index.is_file():
            return [self.directory / name for name in shard_names(index, str(index))]
        raise MissingFileError(
            f"There is neither {_SINGLE} nor {_INDEX} in '{self.directory}'.",
            cure="give the directory of a model saved as safetensors",
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._files[name]
        if self._opened is None or self._opened[0] != path:
            # Opening a file reads the names of all its tensors: once, not for each of them.
            self._opened = path, safe_open(path, framework="pt")
        tensor: torch.Tensor = self._opened[1].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
