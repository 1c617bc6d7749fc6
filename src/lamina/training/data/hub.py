"""Datasets of the hub, of which only data files are read: none can bring code."""

from __future__ import annotations

from typing import Any

from lamina.errors import DataError
from lamina.extras import require

# The builders of `datasets` that parse text and tables.
_SAFE = ("arrow", "csv", "json", "parquet", "text")


def find_builder(path: str, name: str | None, revision: str | None) -> Any:
    """What reads a hub dataset; `hash` is the commit.

    Raises:
        DataError: there is none, the hub can't be asked, or it isn't plain data files.
    """
    datasets = require("datasets", "train")
    if int(datasets.__version__.split(".")[0]) < 4:
        told = f"datasets {datasets.__version__} runs scripts that come with data"
        raise DataError(f"{path} isn't opened: {told}.", cure="pip install 'datasets>=4'")
    try:
        builder = datasets.load_dataset_builder(path, name, revision=revision)
    except Exception as error:
        # What the hub's client raises has no common class.
        raise _failed(path, error) from error
    kind = type(builder).__module__.split(".")[-1]
    if kind not in _SAFE:
        told = f"it is read by the builder {kind!r} of datasets; taken are {', '.join(_SAFE)}"
        raise DataError(f"{path} isn't plain text or tables: {told}.")
    return builder


def open_split(builder: Any, path: str, split: str, streaming: bool) -> Any:
    """A split of it, as a `Dataset` or an `IterableDataset`.

    Raises:
        DataError: the split isn't there, or can't be fetched or read.
    """
    try:
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except Exception as error:
        raise _failed(path, error) from error


def _failed(path: str, error: Exception) -> DataError:
    told = str(error).strip().splitlines() or [type(error).__name__]
    return DataError(
        f"The hub dataset {path} can't be opened.",
        faults=told[:5],
        cure="check its name, configuration and split, or give a path that is there",
    )
