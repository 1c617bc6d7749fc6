"""Folding adapters into a base as peft does it: over what is tied, and with its words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lamina.engine.layers import lora_layers
from lamina.engine.names import places
from lamina.engine.ties import shared_folds, untie
from lamina.errors import FoldError


def warn_of_merged(model: nn.Module, names: Iterable[str]) -> None:
    """Warn if some or all adapters that are about to be folded in are so already."""
    there = {name for _, layer in lora_layers(model) for name in layer.merged_adapters}
    left = [name for name in names if name not in there]
    if there and not left:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    elif there:
        warnings.warn(
            f"Already following adapters were merged {','.join(sorted(there))}. "
            f"You are now additionally merging {','.join(left)}.",
            stacklevel=3,
        )


def untie_for_folding(model: nn.Module, names: Sequence[str]) -> Callable[[], None] | None:
    """Give tied modules a weight each, where folding into one of them would change the others.

    Returns:
        What ties them again; None if nothing had to be untied.
    """
    everything = list(places(model))
    work = [
        (path, layer, [name for name in names if name in layer.records])
        for path, layer in lora_layers(model)
    ]
    if not shared_folds(everything, [each for each in work if each[2]]).refused:
        return None
    warnings.warn(
        "Setting `model.config.tie_word_embeddings=False`: adapters are merged into one of the "
        "tied weights alone, so each module gets one of its own.",
        stacklevel=4,
    )
    return untie(model, everything)


@contextmanager
def undone_on_error(tie_again: Callable[[], None] | None) -> Iterator[None]:
    """Tie again what was untied if folding is refused, and say of NaNs what peft says."""
    try:
        yield
    except FoldError as error:
        if tie_again is not None:
            tie_again()
        if not error.what.startswith("NaN"):
            raise
        broken = sorted({fault.rpartition(" with ")[2].strip("'") for fault in error.faults})
        raise FoldError(
            f"NaNs detected in the merged weights. The adapter {', '.join(broken)} seems to be "
            f"broken. {error.what}",
            faults=error.faults,
            cure=error.cure,
        ) from error
