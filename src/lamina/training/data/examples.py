"""All examples of a source, converted; with everything that is broken in it told at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lamina.errors import DataError
from lamina.extras import require
from lamina.training.data.conversation import BrokenRow
from lamina.training.data.converting import Converted, convert
from lamina.training.data.formats import Layout, find_layout
from lamina.training.data.source import Source

_BATCH = 2_000
_TOLD = 5
# Names that TRL gives to reward functions itself, or keeps from them.
_RESERVED = (
    "completion",
    "completions",
    "completion_ids",
    "prompts",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)


@dataclass(frozen=True)
class Examples:
    """A source's examples, in the columns of a method.

    Attributes:
        source: where they come from.
        layout: how they were laid out.
        dataset: a `Dataset`, or an `IterableDataset` if the source is streaming.
    """

    source: Source
    layout: Layout
    dataset: Any

    @property
    def streaming(self) -> bool:
        """Whether they are read while training."""
        return self.source.data.streaming


def read_examples(source: Source, method: str) -> Examples:
    """Convert a source for a method.

    Raises:
        DataError: it is empty, its format isn't clear or not one that the method learns from, or
            rows of it are broken. All rows are looked at; of streaming data the first hundred, and
            the others when they are met.
    """
    path = source.data.path
    rows = source.first()
    if not rows:
        faults = [f"{place} {row}" for place, row in islice(source.rows(), _TOLD)]
        raise DataError(f"{path} holds no {'whole ' if faults else ''}example.", faults=faults)
    layout = find_layout(source.data, method, rows)
    _check_columns(path, method, layout)
    with quiet():
        if source.data.streaming:
            dataset = _streamed(source, layout, method)
        else:
            dataset = _all(source, layout, method)
        if method == "kto" and layout.format == "preference":
            # As TRL's own trainer of KTO does it: each pair is a wanted and an unwanted answer.
            dataset = require("trl", "train").unpair_preference_dataset(dataset)
    return Examples(source, layout, dataset)


@contextmanager
def quiet(*, always: bool = False) -> Iterator[None]:
    """No progress bars of `datasets`, unless somebody watches and they aren't unwanted."""
    import sys

    datasets = require("datasets", "train")
    if (sys.stderr.isatty() and not always) or not datasets.is_progress_bar_enabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _check_columns(path: str, method: str, layout: Layout) -> None:
    if method == "grpo":
        taken = [name for name in layout.columns if name in _RESERVED]
        cure = f"give it another name: columns: {{answer: {taken[0]}}}" if taken else None
        told = [f"{name} doesn't reach reward functions: TRL has the name" for name in taken]
    else:
        taken = [name for name in layout.used if name == "tools" and method in ("orpo", "pt")]
        told = [f"{name} can't be given to {method}'s trainer" for name in taken]
        cure = "take the column out of the data" if taken else None
    if told:
        raise DataError(f"{path} has columns that can't be passed on.", faults=told, cure=cure)


def _all(source: Source, layout: Layout, method: str) -> Any:
    datasets = require("datasets", "train")
    features = _features(source, layout, method)
    reading = _Reading(source, layout, method)
    rows = iter(reading)
    parts = []
    while batch := list(islice(rows, _BATCH)):
        # Batches behind a broken row are only looked through.
        if not reading.broken:
            parts.append(_table(source.data.path, batch, features))
    reading.check()
    if not parts:
        raise DataError(f"{source.data.path} holds no example.")
    return datasets.concatenate_datasets(parts)


def _table(path: str, batch: list[Converted], features: Any) -> Any:
    datasets, arrow = require("datasets", "train"), require("pyarrow", "train")
    try:
        return datasets.Dataset.from_list(batch, features=features)
    except (arrow.ArrowException, OverflowError, TypeError, ValueError) as error:
        # Of the columns for reward functions, such as numbers of more than 64 bits.
        raise DataError(f"{path} holds values that no table can hold: {error}.") from error


def _streamed(source: Source, layout: Layout, method: str) -> Any:
    datasets = require("datasets", "train")
    start = _Reading(source, layout, method)
    list(islice(start, 100))
    start.check()
    return datasets.IterableDataset.from_generator(
        _stream,
        features=_features(source, layout, method),
        gen_kwargs={"source": source, "layout": layout, "method": method},
    )


def _stream(source: Source, layout: Layout, method: str) -> Iterator[Converted]:
    reading = _Reading(source, layout, method)
    for converted in reading:
        reading.check()
        yield converted
    reading.check()


class _Reading:
    """Whole rows, one after the other; broken ones are left out and remembered."""

    def __init__(self, source: Source, layout: Layout, method: str) -> None:
        self.source, self.layout, self.method = source, layout, method
        self.broken = 0
        self._faults: list[str] = []

    def __iter__(self) -> Iterator[Converted]:
        kinds: dict[str, type] | None = None
        for place, row in self.source.rows():
            if isinstance(row, str):
                self._note(f"{place} {row}")
                continue
            try:
                converted = convert(row, self.layout, self.method)
                kinds = _same_kinds(kinds, converted)
            except BrokenRow as broken:
                self._note(f"{place}: {broken}")
            else:
                yield converted

    def check(self) -> None:
        """Raise for everything broken so far."""
        if not self.broken:
            return
        more = self.broken - len(self._faults)
        raise DataError(
            f"{self.source.data.path} has {self.broken:,} broken "
            f"{'example' if self.broken == 1 else 'examples'} (read as {self.layout.format}).",
            faults=[*self._faults, *([f"and {more:,} more"] if more else [])],
            cure="mend or remove them in the data; nothing was left out",
        )

    def _note(self, fault: str) -> None:
        self.broken += 1
        if len(self._faults) < _TOLD:
            self._faults.append(fault)


def _same_kinds(kinds: dict[str, type] | None, converted: Converted) -> dict[str, type]:
    """The kinds of values in the trainer's own columns: text or messages, the same in all rows."""
    own = {
        key: type(value)
        for key, value in converted.items()
        if key in {"text", "prompt", "completion", "chosen", "rejected", "messages"}
    }
    if kinds is not None and own != kinds:
        changed = next(key for key in {**own, **kinds} if own.get(key) is not kinds.get(key))
        told: dict[type, str] = {str: "text", list: "messages"}
        here = told[own[changed]] if changed in own else "missing"
        raise BrokenRow(f"{changed} is {here}, unlike in the examples before")
    return own


def _features(source: Source, layout: Layout, method: str) -> Any:
    """Types of the converted columns; messages are kept as they are, whatever keys they have."""
    datasets = require("datasets", "train")
    kinds: dict[str, set[type]] = {}
    reading = _Reading(source, layout, method)
    # The columns of reward functions are of any kind, which only all rows show.
    several = 100 if source.data.streaming else None
    for converted in islice(reading, several if method == "grpo" else 1):
        for key, value in converted.items():
            kinds.setdefault(key, set())
            if value is not None:
                kinds[key].add(type(value))
    if not kinds:
        reading.check()
        raise DataError(f"{source.data.path} holds no example.")
    return datasets.Features({key: _feature(each, key) for key, each in kinds.items()})


def _feature(kinds: set[type], column: str) -> Any:
    datasets = require("datasets", "train")
    if kinds == {list} and column in {"messages", "prompt", "completion", "chosen", "rejected"}:
        return datasets.List(datasets.Json())
    names: Mapping[type, str] = {str: "string", bool: "bool", int: "int64", float: "float64"}
    if not kinds or column == "tools":
        return datasets.Value("string")
    if kinds == {int, float}:
        return datasets.Value("float64")
    (first, *more) = kinds
    return datasets.Json() if more or first not in names else datasets.Value(names[first])
