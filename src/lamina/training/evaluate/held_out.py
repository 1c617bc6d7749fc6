"""The held-out examples of an eval, read as a stage's are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lamina.errors import DataError, LaminaError
from lamina.training.data import Examples, Source, open_data, read_examples
from lamina.training.data.chat import check_rendering, check_template
from lamina.training.data.formats import LEARNS_FROM, find_layout
from lamina.training.data.refusals import together
from lamina.training.data.tokens import Sequences, tokenize
from lamina.training.evaluate.likelihood import Labelled
from lamina.training.plan import Plan
from lamina.training.plan.schema import Eval
from lamina.training.plan.settings import Data, Method, Settings

# What of a stage's `trainer_args` says how its examples become tokens.
_OF_TOKENS = ("chat_template_kwargs", "eos_token", "truncation_mode")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Asked:
    """An eval that is to be prepared.

    Attributes:
        name: in the plan.
        eval: what the plan says.
        plan: of it.
        tokenizer: with the plan's chat template.
        root: the folder of the plan's file.
    """

    name: str
    eval: Eval
    plan: Plan
    tokenizer: Any
    root: Path

    def settings(self, method: Method) -> Settings:
        """How the stage whose task it is makes tokens of examples.

        Masks are those of the stage that `stage` names if its method is sft; without such a name,
        of the plan's `defaults`; where those say nothing, TRL's.
        """
        named = next((each for each in self.plan.stages if each.name == self.eval.stage), None)
        like = self.plan.defaults if named is None else self.plan.settings_of(named)
        arguments = {k: v for k, v in (like.trainer_args or {}).items() if k in _OF_TOKENS}
        masked = method == "sft" and (named is None or like.method == "sft")
        return Settings(
            method=method,
            max_length=self.eval.max_length,
            assistant_only_loss=like.assistant_only_loss if masked else None,
            completion_only_loss=like.completion_only_loss if masked else None,
            trainer_args=arguments or None,
        )


@dataclass(frozen=True)
class Part:
    """The examples of one entry of `datasets`, no more than the eval takes.

    Attributes:
        examples: as they were read.
        dataset: those that are taken.
        settings: how they become tokens.
    """

    examples: Examples
    dataset: Any
    settings: Settings

    def dropped(self) -> Iterator[dict[str, Any]]:
        """Of each example, the columns that its format doesn't read."""
        layout = self.examples.layout
        rows = islice(self.examples.source.rows(), len(self.dataset))
        for _, row in rows:
            # Nothing else is left: a broken row would have been refused.
            named = layout.named(row) if isinstance(row, dict) else {}
            yield {name: named.get(name) for name in layout.dropped}


def read_parts(asked: Asked, *methods: Method, masked: bool = True) -> list[Part]:
    """All data of an eval, in the columns of a method.

    Args:
        asked: the eval.
        methods: each source is read for the first of them that its layout has something for.
        masked: whether anything depends on which tokens are trained on.

    Raises:
        DataError: with all that is wrong with any of it.
    """

    def read(data: Data) -> tuple[Examples, Method]:
        source = open_data(data, asked.root)
        method = _method(source, methods, asked.eval.metric)
        return read_examples(source, method), method

    parts: list[Part] = []
    left = asked.eval.max_samples
    for examples, method in each_of(asked.eval.datasets or (), read):
        count = len(examples.dataset) if left is None else min(left, len(examples.dataset))
        left = None if left is None else left - count
        if count:
            parts.append(_part(asked, examples, count, asked.settings(method), masked))
    return parts


def _method(source: Source, methods: Sequence[Method], metric: str) -> Method:
    """The first method that has something to learn from data laid out as this."""
    rows = source.first()
    errors: list[DataError] = []
    for method in methods if rows else ():
        try:
            find_layout(source.data, method, rows)
            return method
        except DataError as error:
            errors.append(error)
    if errors:
        first, method = errors[0], methods[0]
        reads = f"{metric} reads what {method} learns from: {', '.join(LEARNS_FROM[method])}"
        raise DataError(first.what, faults=[*first.faults, reads], cure=first.cure)
    return methods[0]


def _part(asked: Asked, examples: Examples, count: int, settings: Settings, masked: bool) -> Part:
    path = examples.source.data.path
    dataset = examples.dataset.select(range(count))
    settings = _meant(settings, examples if masked else None)
    try:
        check_rendering(dataset[0], asked.tokenizer, settings)
        for example in dataset:
            check_template(example, asked.tokenizer)
    except DataError as error:
        what = f"{path}: {error.what}"
        raise DataError(what, faults=error.faults, cure=error.cure) from None
    return Part(examples, dataset, settings)


def _meant(settings: Settings, examples: Examples | None) -> Settings:
    """Without masks that mean nothing to these examples: a text has no assistant."""
    columns = set(examples.dataset.column_names) if examples else set()
    dropped: dict[str, Any] = {}
    if "completion" not in columns:
        dropped["completion_only_loss"] = None
    if "messages" not in columns:
        dropped["assistant_only_loss"] = None
    return settings.model_copy(update=dropped)


def sequences_of(parts: Iterable[Part], tokenizer: Any) -> Iterator[Sequences]:
    """The tokens of examples, cut and masked as the trainer of the method does it."""
    for part in parts:
        length = part.settings.max_length
        yield from tokenize(part.dataset, part.settings, tokenizer, max_length=length)


def digest_of(sequences: Iterable[Labelled]) -> str:
    """SHA-256 of tokens and of which of them count."""
    told = hashlib.sha256()
    for each in sequences:
        told.update(f"{len(each.ids)}\0".encode())
        told.update(each.ids.numpy().tobytes())
        told.update(each.labels.numpy().tobytes())
    return told.hexdigest()


def each_of(asked: Iterable[Any], read: Callable[[Any], _T]) -> list[_T]:
    """What `read` makes of each; all that it refuses is told together.

    Raises:
        DataError: with the faults of all.
    """
    found: list[_T] = []
    errors: list[LaminaError] = []
    for each in asked:
        try:
            found.append(read(each))
        except LaminaError as error:
            errors.append(error)
    if errors:
        raise together(errors, "Its data can't be used.")
    return found
