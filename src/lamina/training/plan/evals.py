"""What an eval can't be asked; on values as they are written, whatever they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lamina.training.plan.document import Fault, Where

# Setting -> what an eval has to measure for it to mean something.
_ONLY = {
    "metric": ("loss", "accuracy", "exact_match", "a function"),
    "higher_is_better": ("a function",),
    "max_new_tokens": ("exact_match", "a function"),
    "num_fewshot": ("lm_eval",),
}


def faults_of_eval(told: Mapping[str, Any]) -> Iterator[Fault]:
    """Everything in an eval that contradicts something else in it.

    Args:
        told: what the plan says of it, and nothing that it doesn't say.
    """
    given = [key for key in ("datasets", "lm_eval") if told.get(key)]
    if len(given) != 1:
        count = "both" if given else "neither"
        yield (), f"an eval has either datasets or lm_eval; this has {count}"
        return
    measured = _measured(told)
    for key, kinds in _ONLY.items():
        if told.get(key) is not None and measured not in kinds:
            yield (key,), f"means nothing to {measured}; it is for {', '.join(kinds)}"
    datasets = told.get("datasets")
    if isinstance(datasets, Mapping):
        yield from _of_data(("datasets",), datasets)
    for place, data in enumerate(datasets if isinstance(datasets, list) else ()):
        if isinstance(data, Mapping):
            yield from _of_data(("datasets", place), data)


def _of_data(where: Where, data: Mapping[str, Any]) -> Iterator[Fault]:
    if data.get("weight") is not None:
        yield (*where, "weight"), "every example of an eval is measured once"
    if data.get("streaming") is True:
        what = "an eval is read whole; max_samples takes the first of it"
        yield (*where, "streaming"), what


def _measured(told: Mapping[str, Any]) -> str:
    if told.get("lm_eval"):
        return "lm_eval"
    metric = str(told.get("metric") or "loss")
    return "a function" if ":" in metric else metric
