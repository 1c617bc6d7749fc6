"""Two adapters on one place: a module trained whole covers the low-rank updates inside it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lamina.engine.layers import LoraLayer, ModulesToSaveWrapper
from lamina.engine.names import Place, within


def conflicts(
    everything: Iterable[Place], adapted: Collection[str], saved: Collection[str]
) -> list[str]:
    """A line for each place where a new adapter and one in the model would not both take effect.

    Args:
        everything: the model's places.
        adapted: plain names of the layers that the new adapter adapts.
        saved: plain names of the modules that it trains whole.
    """
    faults = []
    for place in everything:
        outer = place.name
        if isinstance(place.module, ModulesToSaveWrapper):
            faults += [
                f"{name} would have no effect: another adapter trains {outer} whole"
                for name in (*adapted, *saved)
                if within(name, outer) and not (name == outer and name in saved)
            ]
            faults += [
                f"modules_to_save: {name} would cover {outer}, which another adapter trains whole"
                for name in saved
                if name != outer and within(outer, name)
            ]
        elif isinstance(place.module, LoraLayer):
            faults += [
                f"modules_to_save: {name} would cover {outer}, which another adapter adapts"
                for name in saved
                if within(outer, name)
            ]
    return faults
