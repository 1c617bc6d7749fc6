"""From the settings of a stage to the data that its trainer is given."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from lamina.errors import DataError
from lamina.extras import require
from lamina.training.data.chat import check_rendering, check_template
from lamina.training.data.examples import Examples, quiet, read_examples
from lamina.training.data.mixture import hold_out, mix, shares
from lamina.training.data.refusals import together
from lamina.training.data.source import open_data
from lamina.training.plan.settings import Data, Settings

_RENDERED = 20


@dataclass(frozen=True)
class SourceReport:
    """What became of one entry of `datasets`.

    Attributes:
        path: as in the plan.
        files: the local files, none of a hub dataset.
        format: how it was laid out.
        rows: examples that are trained on; None of streaming data.
        held_out: examples that are kept for evaluation.
        share: of the mixture, by weight or by number; None of streaming data without weights.
        dropped: columns that nothing reads.
        digest: SHA-256 of the files' bytes, or of a hub name and its commit.
    """

    path: str
    files: tuple[str, ...]
    format: str
    rows: int | None
    held_out: int
    share: float | None
    dropped: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class StageData:
    """The data of a stage, in the columns that TRL's trainer of its method takes.

    Attributes:
        train: a `Dataset`, or an `IterableDataset` if it is streaming.
        evaluation: likewise, of `eval_datasets` or `eval_fraction`; None without them.
        format: how the examples were laid out; several are joined by " + ".
        columns: of `train`.
        rows: examples of an epoch; None of streaming data.
        digest: SHA-256 of all that was read, in the order of the plan.
        sources: of `train`.
    """

    train: Any
    evaluation: Any
    format: str
    columns: tuple[str, ...]
    rows: int | None
    digest: str
    sources: tuple[SourceReport, ...]


def prepare(
    settings: Settings,
    *,
    tokenizer: Any,
    root: str | os.PathLike[str] = ".",
    seed: int | None = None,
) -> StageData:
    """Read, check, convert, mix and hold out the data of a stage.

    Args:
        settings: of the stage, as `Plan.settings_of` gives them.
        tokenizer: of the stage, with its chat template.
        root: the folder of the plan's file.
        seed: of mixing and holding out; that of the settings if not given.

    Raises:
        DataError: data is missing, broken, laid out otherwise than the method needs, or can't be
            rendered by the tokenizer.
    """
    seed = (settings.seed or 0) if seed is None else seed
    parts = _same_columns(_read(settings.datasets or (), settings, root), settings)
    kept = [each.dataset for each in parts]
    held: list[Any] = []
    evaluated = _same_columns(_read(settings.eval_datasets or (), settings, root), settings)
    with quiet():
        if settings.eval_fraction is not None:
            _check_split(parts)
            kept, held = hold_out(kept, settings.eval_fraction, seed=seed)
        train = mix(parts, _none_empty(parts, kept), seed=seed)
        if settings.method == "kto" and not parts[0].streaming:
            # Its trainer goes through the data in order, batches of it being what it compares.
            train = train.shuffle(seed=seed)
        evaluation = _evaluation(evaluated, held)
    for dataset in (train, evaluation):
        for number, example in enumerate(islice(dataset or (), _RENDERED)):
            if not number:
                check_rendering(example, tokenizer, settings)
            check_template(example, tokenizer)
    if settings.method == "orpo":
        train, evaluation = _as_text(train, tokenizer), _as_text(evaluation, tokenizer)
    digests = [each.source.digest for each in (*parts, *evaluated)]
    return StageData(
        train=train,
        evaluation=evaluation,
        format=" + ".join(dict.fromkeys(each.layout.format for each in parts)),
        columns=tuple(train.column_names or ()),
        rows=None if parts[0].streaming else len(train),
        digest=hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        sources=tuple(_reports(parts, kept, held)),
    )


def _read(
    entries: Sequence[Data], settings: Settings, root: str | os.PathLike[str]
) -> list[Examples]:
    """All sources; what is wrong in any of them is told together."""
    assert settings.method is not None
    parts, errors = [], []
    for data in entries:
        try:
            parts.append(read_examples(open_data(data, root), settings.method))
        except DataError as error:
            errors.append(error)
    if errors:
        raise together(errors, f"{len(errors)} of {len(entries)} datasets can't be used.")
    return parts


def _same_columns(parts: list[Examples], settings: Settings) -> list[Examples]:
    """Prompts with answers as whole conversations, where they are mixed with such.

    Which of their tokens are trained on is then up to `assistant_only_loss`, which must be said.
    """
    columns = [set(each.dataset.column_names or ()) for each in parts]
    mixed = any("messages" in each for each in columns) and any(
        "prompt" in each for each in columns
    )
    if settings.method == "sft" and mixed and settings.assistant_only_loss is not None:
        parts = [_joined(each) for each in parts]
    tools = [("tools" in (each.dataset.column_names or ())) for each in parts]
    return [_with_tools(each) for each in parts] if any(tools) and not all(tools) else parts


def _joined(part: Examples) -> Examples:
    features = part.dataset.features
    datasets = require("datasets", "train")
    if "completion" not in features or not isinstance(features["prompt"], datasets.List):
        return part
    kept = {key: kind for key, kind in features.items() if key not in {"prompt", "completion"}}
    made = datasets.Features({"messages": datasets.List(datasets.Json()), **kept})
    with quiet():
        dataset = part.dataset.map(
            lambda row: {"messages": row["prompt"] + row["completion"]},
            remove_columns=["prompt", "completion"],
            features=made,
        )
    return replace(part, dataset=dataset)


def _with_tools(part: Examples) -> Examples:
    """With a column of tools, none of which are there, beside sources that have some."""
    if part.streaming or "tools" in part.dataset.column_names:
        return part
    feature = require("datasets", "train").Value("string")
    nothing = [None] * len(part.dataset)
    return replace(part, dataset=part.dataset.add_column("tools", nothing, feature=feature))


def _as_text(dataset: Any, tokenizer: Any) -> Any:
    """Conversations rendered as ORPO's trainer does it first; its own way keeps them as lists."""
    datasets = require("datasets", "train")
    if dataset is None or not isinstance(dataset.features["prompt"], datasets.List):
        return dataset
    made = datasets.Features({name: datasets.Value("string") for name in dataset.features})
    render = require("trl", "train").apply_chat_template
    with quiet():
        return dataset.map(
            render,
            fn_kwargs={"processing_class": tokenizer},
            features=made,
            remove_columns=dataset.column_names,
        )


def _check_split(parts: Sequence[Examples]) -> None:
    if parts[0].streaming:
        told = "streaming data has no end that is known"
        raise DataError(f"eval_fraction: {told}.", cure="give eval_datasets, or streaming: false")


def _none_empty(parts: Sequence[Examples], datasets: list[Any]) -> list[Any]:
    empty = [
        part.source.data.path
        for part, dataset in zip(parts, datasets, strict=True)
        if not part.streaming and not len(dataset)
    ]
    if empty:
        faults = [f"{path}: all of it is held out" for path in empty]
        raise DataError("Nothing is left to train on.", faults=faults, cure="give eval_datasets")
    return datasets


def _evaluation(parts: Sequence[Examples], held: Sequence[Any]) -> Any:
    weighted = [each.source.data.path for each in parts if each.source.data.weight is not None]
    if weighted:
        faults = [f"{path} has a weight" for path in weighted]
        raise DataError("eval_datasets are measured whole, every example once.", faults=faults)
    datasets = [each.dataset for each in parts] or list(held)
    if not datasets:
        return None
    if len({str(each.features) for each in datasets}) > 1:
        return mix(parts, datasets, seed=0)
    return require("datasets", "train").concatenate_datasets(datasets)


def _reports(
    parts: Sequence[Examples], kept: Sequence[Any], held: Sequence[Any]
) -> list[SourceReport]:
    drawn = shares(parts)
    counts = [None if each.streaming else len(kept[i]) for i, each in enumerate(parts)]
    total = sum(count or 0 for count in counts)
    return [
        SourceReport(
            path=part.source.data.path,
            files=tuple(str(file) for file in part.source.files),
            format=part.layout.format,
            rows=count,
            held_out=len(held[number]) if held else 0,
            share=drawn[number] if drawn else (count / total if count is not None else None),
            dropped=part.layout.dropped,
            digest=part.source.digest,
        )
        for number, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]
