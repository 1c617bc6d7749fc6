"""Lay an adapter over a base for a while: to ask it, to read its updates, and to take it off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.probe import ProbeComparison, ask, compare_answers
from lamina.checkpoint.record import Probe, StageRecord
from lamina.model import PeftModel, loading
from lamina.model.adapted import refuse_adapted
from lamina.model.vocabulary import grown
from lamina.stages.flat import Flat
from lamina.stages.load import check_base
from lamina.stages.probing import probe_of
from lamina.stages.verify import opening

_NAME = "replayed"


def open_base(
    file: AdapterFile, record: StageRecord, base: nn.Module | str, allow_base_mismatch: bool
) -> nn.Module:
    """The base of an adapter, as it was given, or loaded from a path as it was on record.

    Raises:
        StageError: it is not the one that the adapter was trained on.
        AlreadyAdaptedError: it has adapters.
        MissingFileError: it can't be opened.
    """
    if isinstance(base, nn.Module):
        opened = base
        refuse_adapted(opened)
    else:
        opened = opening.open_base(file, record, base)
    if not allow_base_mismatch:
        with grown(opened, file):
            check_base(record, opened, file)
    return opened


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


def replay(
    base: nn.Module, reference: AdapterFile, flat: Flat
) -> tuple[ProbeComparison | None, Probe | None]:
    """How the answers of a flattened adapter differ from a reference's, and what they are."""
    with adapted(base, reference) as (model, _):
        expected = ask(model)
    with adapted(base, flat.file) as (model, name):
        actual = ask(model)
        probe, _ = probe_of(model, [name], list(flat.record.saved_modules))
    if expected is None or actual is None:
        return None, None
    return compare_answers(expected, actual), probe
