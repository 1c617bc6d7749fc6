"""The chain that a directory holds, read from its header alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lamina.checkpoint.header import read_headers
from lamina.checkpoint.origin import record_of
from lamina.checkpoint.record import StageRecord
from lamina.config import LoraConfig, PeftConfig
from lamina.storage.source import find_adapter


def lineage(path: str | Path, **where: Any) -> StageRecord:
    """The stages of an adapter and whose ranks are whose; no weights are read.

    Args:
        path: a stage's directory, or any plain PEFT adapter (one stage of unknown origin).
        where: `subfolder` and hub options.

    Raises:
        CheckpointError: files are missing or broken.
        RecordError: the record is damaged, newer than is known, or contradicts the tensors.
    """
    files = find_adapter(path, **where)
    config = PeftConfig.from_dict(PeftConfig.from_json_file(files.config), source=str(files.config))
    headers, metadata = read_headers(files)
    shapes = {key: entry["shape"] for each in headers.values() for key, entry in each.items()}
    return record_of(cast(LoraConfig, config), shapes, metadata, source=files.root)
