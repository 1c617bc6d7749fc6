"""Whether the data of a plan is there, in a format that its method learns from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lamina.errors import LaminaError, PlanError
from lamina.training.data import Source, open_data, prepare
from lamina.training.data.chat import check_rendering, check_template
from lamina.training.data.conversation import BrokenRow
from lamina.training.data.converting import convert
from lamina.training.data.formats import find_layout
from lamina.training.evaluate.prepared import prepare_evals
from lamina.training.plan import Plan
from lamina.training.plan.document import Document, Fault, Where
from lamina.training.plan.schema import Eval
from lamina.training.plan.settings import Data, Settings
from lamina.training.preflight.places import place_of
from lamina.training.preflight.report import DataReport
from lamina.training.trainers.functions import find_function, importable

# Larger files are looked into, and not read through.
_READ_BYTES = 64 << 20
_RENDERED = 3


def look_at_data(
    plan: Plan, document: Document, root: Path, tokenizer: Any
) -> tuple[list[DataReport], list[Fault]]:
    """All data of all stages and evals: there, whole, and in a format of the method.

    Files of up to 64 MB in all are prepared as for training, so that every row is looked at and
    counted; of larger ones and of hub datasets the first rows are looked at.

    Args:
        plan: the plan.
        document: its places.
        root: the folder of its file.
        tokenizer: whose chat template conversations need; None if it can't be loaded.
    """
    reports: list[DataReport] = []
    faults: list[Fault] = []
    for place, stage in enumerate(plan.stages):
        settings = plan.settings_of(stage)
        looked = _Looked(settings, root, tokenizer)
        for key in ("datasets", "eval_datasets"):
            for number, data in enumerate(getattr(settings, key) or ()):
                where = _item(document, place_of(document, place, key), number)
                looked.look(data, where, formats=key == "datasets")
        where = place_of(document, place, "datasets")
        reports.append(DataReport(tuple(looked.formats), looked.examples(where)))
        faults += looked.faults
    faults += _of_evals(plan, document, root, tokenizer)
    return reports, faults


def _item(document: Document, where: Where, number: int) -> Where:
    """One of a list of data; a single one stands where the list would."""
    return (*where, number) if (*where, number) in document.lines else where


def _of_evals(plan: Plan, document: Document, root: Path, tokenizer: Any) -> Iterator[Fault]:
    for name, asked in plan.evals.items():
        found = list(_of_eval_data(name, asked, document, root))
        yield from found
        if not found and tokenizer is not None:
            yield from _of_eval(plan, name, root, tokenizer)


def _of_eval(plan: Plan, name: str, root: Path, tokenizer: Any) -> Iterator[Fault]:
    """What keeps its data from being measured as it asks; its function is looked at elsewhere."""
    asked = plan.evals[name]
    alone = plan.model_copy(update={"evals": {name: asked}})
    with importable(root, Path.cwd()):
        try:
            if ":" in asked.metric:
                find_function(asked.metric)
        except PlanError:
            return
        try:
            prepare_evals(alone, tokenizer=tokenizer, root=root)
        except LaminaError as error:
            told = "; ".join(each.removeprefix(f"{name}: ") for each in error.faults)
            yield ("evals", name), told or error.what


def _of_eval_data(name: str, asked: Eval, document: Document, root: Path) -> Iterator[Fault]:
    for number, data in enumerate(asked.datasets or ()):
        where = _item(document, ("evals", name, "datasets"), number)
        try:
            if not _peek(open_data(data, root)):
                yield where, f"{data.path} holds no whole example"
        except LaminaError as error:
            yield where, _one_line(error)


def _peek(source: Source) -> list[dict[str, Any]]:
    """The first rows; of a hub dataset without downloading the others."""
    if source.builder is not None:
        streaming = source.data.model_copy(update={"streaming": True})
        source = dataclasses.replace(source, data=streaming)
    return source.first()


def _one_line(error: LaminaError) -> str:
    return " ".join([error.what, *error.faults])


class _Looked:
    """The data of one stage: what was found, and what is wrong."""

    def __init__(self, settings: Settings, root: Path, tokenizer: Any) -> None:
        self._settings, self._root, self._tokenizer = settings, root, tokenizer
        self.formats: list[str] = []
        self.faults: list[Fault] = []
        self._bytes: int | None = 0

    def look(self, data: Data, where: Where, *, formats: bool) -> None:
        """Open one source and convert its first rows."""
        method = self._settings.method or "sft"
        try:
            source = open_data(data, self._root)
            rows = _peek(source)
            if not rows:
                self.faults.append((where, f"{data.path} holds no whole example"))
                return
            layout = find_layout(data, method, rows)
            if self._tokenizer is not None:
                converted = [convert(row, layout, method) for row in islice(rows, _RENDERED)]
                check_rendering(converted[0], self._tokenizer, self._settings)
                for example in converted:
                    check_template(example, self._tokenizer)
        except LaminaError as error:
            self.faults.append((where, _one_line(error)))
            return
        except BrokenRow as error:
            self.faults.append((where, f"{data.path}, one of the first examples: {error}"))
            return
        if formats:
            self.formats.append(layout.format)
        self._add(source)

    def _add(self, source: Source) -> None:
        if self._bytes is None or source.builder is not None or source.data.streaming:
            self._bytes = None
        else:
            self._bytes += sum(each.stat().st_size for each in source.files)

    def examples(self, where: Where) -> int | None:
        """How many there are to train on, if reading them all takes little."""
        if self.faults or self._tokenizer is None or not self._settings.datasets:
            return None
        if self._bytes is None or self._bytes > _READ_BYTES:
            return None
        try:
            return prepare(self._settings, tokenizer=self._tokenizer, root=self._root).rows
        except LaminaError as error:
            self.faults.append((where, _one_line(error)))
            return None
