"""Lay an adapter over a base for a while: to ask it, to read its updates, and to take it off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lamina.checkpoint.adapter import AdapterFile
from lamina.model import PeftModel, loading
from lamina.model.vocabulary import grown

_NAME = "replayed"


@contextmanager
def adapted(base: nn.Module, file: AdapterFile) -> Iterator[tuple[PeftModel, str]]:
    """The base with an adapter over it, and the adapter's name; afterwards the base is itself."""
    training = {module: module.training for module in base.modules()}
    flags = {parameter: parameter.requires_grad for parameter in base.parameters()}
    with grown(base, file):
        kind = PeftModel.for_task(file.config.task_type)
        model = loading.over(kind, base, file, loading.How(), _NAME).eval()
    try:
        yield model, _NAME
    finally:
        model.unload()
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
