"""Adapters of a model whose vocabulary was resized: its size is told, and loading resizes again.

Only the rows that were trained are in such a file. Resizing is right where it has all new rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.origin import PREFIX, plain_key
from lamina.checkpoint.record import read_record
from lamina.config import LoraConfig
from lamina.engine.names import places, suffixes, unadapted
from lamina.errors import CheckpointError, RecordError

KEY = "lamina_vocabulary"


def vocabulary_entry(model: nn.Module, config: LoraConfig) -> dict[str, str]:
    """What the header of an adapter with replaced rows says of the vocabulary; else nothing."""
    rows = _rows(model)
    if not config.trainable_token_indices or rows is None:
        return {}
    return {KEY: json.dumps({"size": rows})}


@contextmanager
def grown(model: nn.Module, file: AdapterFile) -> Iterator[None]:
    """Give a base as many rows as the adapter was trained with; on an error, its own again.

    Raises:
        CheckpointError: the file lacks some of the rows that the base doesn't have.
    """
    before, wanted = _rows(model), _size_in(file)
    if before is None or wanted is None or wanted <= before or not _concerns(model, file):
        yield
        return
    _check_covered(model, file, range(before, wanted))
    _resize(model, wanted)
    try:
        yield
    except BaseException:
        _resize(model, before)
        raise


def _resize(model: nn.Module, rows: int) -> None:
    modes = {name: table.training for name, table in _tables(model).items()}
    resize: Any = model.resize_token_embeddings
    resize(rows, mean_resizing=False)
    # Resizing puts new tables in their places, in training mode.
    for name, table in _tables(model).items():
        table.training = modes.get(name, model.training)


def _rows(model: nn.Module) -> int | None:
    table = _table(model, "get_input_embeddings")
    if table is None or not hasattr(model, "resize_token_embeddings"):
        return None
    weight = getattr(table, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _table(model: nn.Module, getter: str) -> nn.Module | None:
    get = getattr(model, getter, None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:
        return None
    return unadapted(found) if isinstance(found, nn.Module) else None


def _tables(model: nn.Module) -> dict[str, nn.Module]:
    """Plain name -> table, the head left out where it shares the embedding's weight."""
    found = {}
    first = _table(model, "get_input_embeddings")
    last = _table(model, "get_output_embeddings")
    tied = getattr(first, "weight", None) is getattr(last, "weight", None)
    for table in (first,) if tied else (first, last):
        for place in places(model):
            if table is not None and place.original is table:
                found[place.name] = table
    return found


def _size_in(file: AdapterFile) -> int | None:
    try:
        size = json.loads(file.metadata.get(KEY, "{}")).get("size")
        record = read_record(file.metadata)
    except (ValueError, AttributeError, RecordError):
        return None
    if isinstance(size, int):
        return size
    return None if record is None else record.newest.base.vocab_size


def _rows_in(file: AdapterFile, name: str, is_input: bool) -> set[int] | None:
    """The rows of a table that the file has; None if it has the whole table."""
    whole = f"{name}.weight"
    if any(plain_key(key).removeprefix(PREFIX) == whole for key in file.tensors):
        return None
    indices = file.config.trainable_token_indices or {}
    if not isinstance(indices, dict):
        return set(indices) if is_input else set()
    return {row for target in indices if target in suffixes(name) for row in indices[target]}


def _concerns(model: nn.Module, file: AdapterFile) -> bool:
    found = [_rows_in(file, name, i == 0) for i, name in enumerate(_tables(model))]
    return any(rows is None or rows for rows in found)


def unsaved_rows(model: nn.Module, file: AdapterFile) -> list[str]:
    """New rows of a resized base, adapted by now, that its adapter's file doesn't have.

    Nothing is told of a base whose own config isn't on this disk.
    """
    before, now = _rows_on_disk(model), _rows(model)
    if before is None or now is None or now <= before:
        return []
    return [
        f"{name}: {count} of the {now - before} rows by which the base was resized"
        for name, count in _lacking(model, file, range(before, now)).items()
    ]


def _rows_on_disk(model: nn.Module) -> int | None:
    """The size of the vocabulary that the base's directory, or its copy in the cache, tells."""
    from transformers.utils.hub import cached_file

    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    try:
        found = cached_file(name, "config.json", local_files_only=True)
        settings = json.loads(Path(str(found)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    text = settings.get("text_config") if isinstance(settings, dict) else None
    size = (text if isinstance(text, dict) else settings).get("vocab_size")
    return size if isinstance(size, int) else None


def _lacking(model: nn.Module, file: AdapterFile, new: range) -> dict[str, int]:
    """Plain name of a table -> how many of the new rows the file doesn't have for it."""
    lacking = {}
    for position, name in enumerate(_tables(model)):
        rows = _rows_in(file, name, position == 0)
        missing = set() if rows is None else set(new) - rows
        if missing:
            lacking[name] = len(missing)
        # Trained whole, the embedding is a copy: a head that was tied to it keeps the base's.
        head = _tied_head(model) if position == 0 and rows is None else None
        if head and not file.config.ensure_weight_tying and _rows_in(file, head, False) is not None:
            lacking[head] = len(new)
    return lacking


def _tied_head(model: nn.Module) -> str | None:
    """The plain name of the head that shares the embedding's weight."""
    first, last = _table(model, "get_input_embeddings"), _table(model, "get_output_embeddings")
    if last is None or last is first or getattr(first, "weight", None) is not last.weight:
        return None
    return next((place.name for place in places(model) if place.original is last), None)


def _check_covered(model: nn.Module, file: AdapterFile, new: range) -> None:
    lacking = _lacking(model, file, new)
    faults = [
        f"{name}: {count} of the {len(new)} new rows are not in the file"
        for name, count in lacking.items()
    ]
    if faults:
        raise CheckpointError(
            f"{file.source} was trained with a vocabulary of {new.stop}; this has {new.start}.",
            faults=faults,
            cure=f"model.resize_token_embeddings({new.stop}) and give the new rows the values that "
            "they had in training; to have them in the file, train them by "
            f"trainable_token_indices={{{', '.join(f'{name!r}: [...]' for name in lacking)}}}",
        )
