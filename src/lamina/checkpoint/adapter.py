"""One adapter on disk: its config, its tensors, its stage record if it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lamina.checkpoint.header import read_headers
from lamina.checkpoint.origin import record_of
from lamina.checkpoint.record import StageRecord
from lamina.checkpoint.written import check_whole, check_written
from lamina.config import CONFIG_NAME, LoraConfig, PeftConfig
from lamina.errors import CheckpointError
from lamina.storage.source import AdapterFiles, PathOrId, find_adapter

WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it was read.

    Attributes:
        source: where it came from, for messages.
        config: its config.
        tensors: name on disk -> tensor.
        metadata: the strings in the header of the safetensors file.
    """

    source: str
    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the tensors, by their names."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    def record(self) -> StageRecord:
        """What made it; of a plain adapter, one stage of unknown origin.

        Raises:
            RecordError: the record contradicts the tensors.
        """
        return record_of(self.config, self.shapes, self.metadata, source=self.source)


def read_adapter(
    path_or_id: PathOrId,
    *,
    config: PeftConfig | None = None,
    device: str | torch.device = "cpu",
    **where: Any,
) -> AdapterFile:
    """Read an adapter from a directory or a hub repository.

    Args:
        path_or_id: the directory, or the repository's id.
        config: taken in place of the one in the file.
        device: where the tensors go; files are mapped, not copied, on the CPU.
        where: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`,
            `force_download`, `allow_pickle`; see `lamina.storage.source.find_adapter`.

    Raises:
        CheckpointError: a file is missing or broken, or a pickle that was not asked for.
    """
    files = find_adapter(path_or_id, **where)
    if config is None:
        config = PeftConfig.from_dict(
            PeftConfig.from_json_file(files.config), source=str(files.config)
        )
    tensors, metadata = _read_weights(files, torch.device(device))
    return AdapterFile(files.root, cast(LoraConfig, config), tensors, metadata)


def _read_weights(
    files: AdapterFiles, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if files.pickle:
        return _read_pickle(files.weights[0], device), {}
    _, metadata = read_headers(files)
    tensors: dict[str, torch.Tensor] = {}
    for path in files.weights:
        try:
            with safe_open(path, framework="pt", device=str(device)) as opened:
                tensors.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} can't be read as safetensors: {error}",
                cure="save or download the adapter again; the file is incomplete or damaged",
            ) from error
    return tensors, metadata


def _read_pickle(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        # torch raises whatever the file makes it raise.
        raise CheckpointError(f"{path} can't be read as weights: {error}") from error
    if not isinstance(loaded, dict) or not all(
        isinstance(v, torch.Tensor) for v in loaded.values()
    ):
        raise CheckpointError(f"{path} holds something other than named tensors.")
    return cast("dict[str, torch.Tensor]", loaded)


def write_adapter(
    directory: Path,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the two files of an adapter into a directory that nobody reads yet.

    The weights are opened again and compared with memory. Make it whole or not at all by writing
    inside `lamina.storage.atomic.atomic_directory`.

    Raises:
        CheckpointError: a tensor is not whole in this process, is not a number, or isn't in the
            file as it is in memory.
    """
    check_whole(tensors)
    directory.mkdir(parents=True, exist_ok=True)
    taken: set[int] = set()
    own = {key: _own(tensor, taken) for key, tensor in tensors.items()}
    strings = {"format": "pt", **(metadata or {})}
    save_file(own, directory / WEIGHTS_NAME, metadata=strings)
    check_written(directory / WEIGHTS_NAME, own, strings)
    (directory / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")


def _own(tensor: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """The tensor on the CPU with memory of its own, as safetensors asks for."""
    tensor = tensor.detach().cpu()
    storage = tensor.untyped_storage()
    whole = storage.nbytes() == tensor.numel() * tensor.element_size()
    if not whole or not tensor.is_contiguous() or storage.data_ptr() in taken:
        return tensor.clone(memory_format=torch.contiguous_format)
    taken.add(storage.data_ptr())
    return tensor
