"""A base model to examine an adapter against: its structure and headers, no weights loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.checkpoint.doctor.findings import Finding
from lamina.checkpoint.sketch import FileWeights
from lamina.errors import LaminaError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BaseModel:
    """What is known of a base model.

    Attributes:
        name: its directory or hub id, as it was given.
        model: all its modules, on the meta device; None if its class can't be built.
        weights: its files; None if they aren't on this disk.
    """

    name: str
    model: nn.Module | None
    weights: FileWeights | None

    @property
    def dtype(self) -> str | None:
        """The dtype of most of its entries, as the files store them."""
        counts: Counter[str] = Counter()
        for tensor in self.weights.tensors.values() if self.weights else ():
            if tensor.dtype is not None:
                size = 1
                for length in tensor.shape:
                    size *= length
                counts[str(tensor.dtype)] += size
        return counts.most_common(1)[0][0] if counts else None

    @property
    def modules(self) -> frozenset[str]:
        """Names of the modules that have weights, by the names in the files."""
        tensors = self.weights.tensors if self.weights else {}
        return frozenset(name.rpartition(".")[0] for name in tensors)


def read_base(
    name: str, revision: str | None, trust_remote_code: bool
) -> tuple[BaseModel | None, list[Finding]]:
    """A base by its directory or hub id; what can't be had becomes a finding."""
    weights, found = _weights(name, revision)
    model, more = _structure(name, revision, trust_remote_code)
    if model is None and weights is None:
        what = f"The base {name} can't be read: {more[0].what if more else 'it has no files'}"
        cure = "give a directory with config.json and safetensors files, or a hub id"
        return None, [Finding("error", "base-unreadable", what, (name,), cure)]
    return BaseModel(name, model, weights), [*found, *more]


def _structure(
    name: str, revision: str | None, trust_remote_code: bool
) -> tuple[nn.Module | None, list[Finding]]:
    from lamina.checkpoint.structure import empty_model

    try:
        return empty_model(name, revision=revision, trust_remote_code=trust_remote_code), []
    except Exception as error:
        # A model's own code, or its config, may raise anything.
        said = error.what if isinstance(error, LaminaError) else f"{type(error).__name__}: {error}"
    what = f"The structure of the base is unknown, so names are compared with its files: {said}"
    cure = "pass --trust-remote-code if the model has code of its own and you trust it"
    return None, [Finding("note", "base-structure-unknown", what, (name,), cure)]


def _weights(name: str, revision: str | None) -> tuple[FileWeights | None, list[Finding]]:
    directory = _directory(name, revision)
    if directory is None:
        what = "The base's weights are not on this disk, so that their values were not compared"
        cure = "give the directory that the base lies in"
        return None, [Finding("note", "base-weights-unknown", what, (name,), cure)]
    try:
        return FileWeights(directory), []
    except (LaminaError, OSError, ValueError) as error:
        said = error.what if isinstance(error, LaminaError) else str(error)
        what = f"The base's weights can't be read: {said}"
        cure = "save the base as safetensors, or download it again"
        return None, [Finding("note", "base-weights-unknown", what, (name,), cure)]


def _directory(name: str, revision: str | None) -> Path | None:
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json"]
        found: Any = snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=patterns
        )
    except Exception:
        # The hub's client raises many things; all of them mean that it isn't here.
        return None
    return Path(found)
