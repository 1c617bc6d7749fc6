"""Several sources as one: every example once, or by weight; and a share of them held out."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lamina.errors import DataError
from lamina.extras import require
from lamina.training.data.examples import Examples

_BUFFER = 1_000
_LONGEST_EPOCH = 20_000_000


def shares(parts: Sequence[Examples]) -> list[float] | None:
    """Each source's share of the examples, by the weights; None if they have none.

    Raises:
        DataError: some have a weight and others don't, or streaming sources have none.
    """
    weights = [each.source.data.weight for each in parts]
    given = [weight for weight in weights if weight is not None]
    if len(parts) > 1 and parts[0].streaming and not given:
        told = "streaming sources have no length that is known, and so no share by their length"
        raise DataError(f"{told}.", cure="give every one of them a weight")
    if given and len(given) < len(weights):
        faults = [f"{each.source.data.path}: {each.source.data.weight}" for each in parts]
        raise DataError(
            "Some sources of a mixture have a weight, others don't.",
            faults=faults,
            cure="give every one a weight, or none",
        )
    return [weight / sum(given) for weight in given] if given else None


def mix(parts: Sequence[Examples], datasets: Sequence[Any], *, seed: int) -> Any:
    """One data set of several.

    Without weights, each example comes once per epoch. With weights, each next example is of a
    source drawn by its share, in the order of that source; an epoch ends when every example has
    come at least once, so that sources with more weight than examples come around again. Its length
    is about max(examples / share). The same seed draws the same. Streaming data are also shuffled,
    within a thousand examples.

    Raises:
        DataError: the sources' columns differ, or an epoch would be too long to be meant.
    """
    library = require("datasets", "train")
    drawn = shares(parts)
    _check_columns(parts, datasets)
    if len(parts) > 1 and drawn is not None:
        if not parts[0].streaming:
            _check_length(parts, datasets, drawn)
        whole = library.interleave_datasets(
            list(datasets), probabilities=drawn, seed=seed, stopping_strategy="all_exhausted"
        )
    else:
        whole = datasets[0] if len(datasets) == 1 else library.concatenate_datasets(list(datasets))
    return whole.shuffle(seed=seed, buffer_size=_BUFFER) if parts[0].streaming else whole


def hold_out(datasets: Sequence[Any], fraction: float, *, seed: int) -> tuple[list[Any], list[Any]]:
    """Each data set without, and with nothing but, the examples that are held out.

    They are those whose SHA-256 (of the prompt if there is one, else of the whole example) together
    with the seed's is smallest, so that examples that are equal, or have the same prompt, are never
    on both sides, in any order of the files.

    Raises:
        DataError: nothing can be held out, or nothing is left.
    """
    alike: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    for number, dataset in enumerate(datasets):
        asked = dataset.select_columns(["prompt"]) if "prompt" in dataset.column_names else dataset
        for place, row in enumerate(asked):
            alike[_key(row, seed)].append((number, place))
    total = sum(len(dataset) for dataset in datasets)
    wanted = max(1, round(fraction * total))
    held: set[tuple[int, int]] = set()
    for key in sorted(alike):
        # A prompt that very many examples share would take too many along.
        if len(held) + len(alike[key]) <= wanted:
            held.update(alike[key])
    if not held or len(held) == total:
        raise DataError(
            f"Of {total:,} examples with {len(alike):,} different prompts or texts, a share of "
            f"{fraction:g} can't be held out.",
            cure="more data, another eval_fraction, or eval_datasets",
        )
    sides: list[list[Any]] = [[], []]
    for number, dataset in enumerate(datasets):
        for side, inside in zip(sides, (False, True), strict=True):
            places = [i for i in range(len(dataset)) if ((number, i) in held) is inside]
            side.append(dataset.select(places))
    return sides[0], sides[1]


def _key(row: Any, seed: int) -> bytes:
    told = json.dumps([seed, row], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).digest()


def _check_columns(parts: Sequence[Examples], datasets: Sequence[Any]) -> None:
    first = datasets[0].features
    if all(each.features == first for each in datasets):
        return
    faults = [
        f"{part.source.data.path} ({part.layout.format}): "
        + ", ".join(f"{name} ({_said(kind)})" for name, kind in dataset.features.items())
        for part, dataset in zip(parts, datasets, strict=True)
    ]
    raise DataError(
        "Sources that become different columns can't be mixed.",
        faults=faults,
        cure="lay them out alike (format, columns); sft on conversations of both kinds needs "
        "assistant_only_loss: true (answers alone) or false (whole conversations)",
    )


def _said(kind: Any) -> str:
    name = type(kind).__name__
    return {"List": "messages", "Json": "JSON"}.get(name, str(getattr(kind, "dtype", name)))


def _check_length(
    parts: Sequence[Examples], datasets: Sequence[Any], drawn: Sequence[float]
) -> None:
    faults = [
        f"{part.source.data.path}: {len(dataset):,} examples are {share:.2%} of an epoch of "
        f"{len(dataset) / share:,.0f}"
        for part, dataset, share in zip(parts, datasets, drawn, strict=True)
        if len(dataset) / share > max(_LONGEST_EPOCH, 10 * sum(map(len, datasets)))
    ]
    if faults:
        cure = "weights that are nearer to the numbers of examples, max_samples, or streaming"
        raise DataError("An epoch of this mixture has no end.", faults=faults, cure=cure)
