"""The head of a task that an adapter brings along: how large the base's has to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.checkpoint.header import read_headers
from lamina.checkpoint.origin import PREFIX, plain_key
from lamina.config import PeftConfig
from lamina.model.facade import PeftModel
from lamina.storage.source import PathOrId, find_adapter

# Of those among the heads of tasks whose outputs transformers calls labels: what they end in.
_LABELS = ("score", "classifier", "classifier.out_proj")


def head_options(config: PeftConfig, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What the base has to be loaded with, so that the head that an adapter brings fits.

    A language model that is loaded as a classifier gets a new head, of two labels if nobody says
    otherwise; the file says it.

    Args:
        config: of the adapter.
        shapes: of its tensors, by their names on disk.
    """
    heads = PeftModel.for_task(config.task_type).task_heads
    for key, shape in shapes.items():
        module, _, leaf = plain_key(key).removeprefix(PREFIX).rpartition(".")
        if leaf == "weight" and module in _LABELS and module.partition(".")[0] in heads:
            return {"num_labels": int(shape[0])}
    return {}


def head_options_of(config: PeftConfig, path: PathOrId, **where: Any) -> dict[str, Any]:
    """`head_options` of an adapter that is not read yet: from the headers of its files."""
    if not PeftModel.for_task(config.task_type).task_heads:
        return {}
    files = find_adapter(path, **where)
    if files.pickle:
        return {}
    headers, _ = read_headers(files)
    shapes = {key: each["shape"] for header in headers.values() for key, each in header.items()}
    return head_options(config, shapes)
