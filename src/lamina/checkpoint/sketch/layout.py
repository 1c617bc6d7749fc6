"""The names that tensors in a model's files get when transformers loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def names_as_loaded(
    directory: Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str] | None:
    """Name in the files -> name in the model; None if its class can't be built.

    What is fused, split or turned around on the way has none: its values are elsewhere there.

    Args:
        directory: of the model; no code in it is run.
        shapes: name in the files -> shape.
    """
    # Torch and transformers are imported only where the names in the files aren't enough.
    from lamina.checkpoint.stream.names import naming
    from lamina.checkpoint.structure import empty_model

    try:
        units = naming(empty_model(str(directory)), shapes).units
    except Exception:
        # A config may say anything, and transformers' own classes raise anything then.
        return None
    return {unit.keys[0]: unit.names[0] for unit in units if unit.load is None}
