"""How the factors of a new adapter begin: a table from `init_lora_weights` to initialisations.

An initialisation fills A and B in place. It may look at the layer (its kind and base weight).
"""

from __future__ import annotations

import re

from lamina.engine.init.base import Begun, Initialisation
from lamina.engine.init.standard import gaussian, kaiming, random
from lamina.errors import UnsupportedFieldError

__all__ = ["Begun", "Initialisation", "initialisation", "register"]

_METHODS: dict[bool | str, Initialisation] = {
    True: Initialisation(kaiming),
    "gaussian": Initialisation(gaussian),
    False: Initialisation(random),
}


def register(name: str, method: Initialisation) -> None:
    """Offer a method as `init_lora_weights=name`; `name` may be a regular expression."""
    _METHODS[name] = method


def initialisation(name: bool | str) -> Initialisation:
    """The initialisation of that name (in any case).

    Raises:
        UnsupportedFieldError: there is none.
    """
    if name in _METHODS:
        return _METHODS[name]
    for known, method in _METHODS.items():
        if isinstance(known, str) and re.fullmatch(known, str(name).lower()):
            return method
    names = ", ".join(repr(method) for method in _METHODS)
    raise UnsupportedFieldError(
        f"init_lora_weights={name!r} is not an initialisation that Lamina has.",
        cure=f"use one of {names}",
    )
