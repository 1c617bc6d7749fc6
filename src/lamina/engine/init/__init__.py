"""How the factors of a new adapter begin: a table from `init_lora_weights` to functions.

An initialisation fills A and B in place. It may look at the layer (its kind and base weight).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lamina.engine.init.standard import gaussian, kaiming, random
from lamina.errors import UnsupportedFieldError

Initialise = Callable[[torch.Tensor, torch.Tensor, bool], None]

_METHODS: dict[bool | str, Initialise] = {True: kaiming, "gaussian": gaussian, False: random}


def register(name: str, method: Initialise) -> None:
    """Offer `method(A, B, is_embedding)` as `init_lora_weights=name`."""
    _METHODS[name] = method


def initialisation(name: bool | str) -> Initialise:
    """The initialisation of that name (in any case).

    Raises:
        UnsupportedFieldError: there is none.
    """
    key = name.lower() if isinstance(name, str) else name
    if key not in _METHODS:
        known = ", ".join(repr(method) for method in _METHODS)
        raise UnsupportedFieldError(
            f"init_lora_weights={name!r} is not an initialisation that Lamina has.",
            cure=f"use one of {known}",
        )
    return _METHODS[key]
