"""Ask a base what it answers with an adapter, and with another that should do the same."""

from __future__ import annotations

from torch import nn

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.probe import ProbeComparison, ask, compare_answers
from lamina.checkpoint.record import Probe, StageRecord
from lamina.model.adapted import refuse_adapted
from lamina.model.vocabulary import grown
from lamina.stages.flat import Flat
from lamina.stages.laid_over import adapted
from lamina.stages.load import check_base
from lamina.stages.probing import probe_of
from lamina.stages.verify import opening


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
