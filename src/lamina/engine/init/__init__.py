"""How the factors of a new adapter begin: a table from `init_lora_weights` to initialisations.

An initialisation fills A and B in place. It may look at the layer (its kind and base weight), and
some take a part out of the base's weight; see `lamina.engine.layers.displacing`.
"""

from __future__ import annotations

import re

from lamina.engine.init import corda, loftq, loraga, mica, orthogonal
from lamina.engine.init.base import Begun, Fault, Initialisation
from lamina.engine.init.eva import eva
from lamina.engine.init.matrices import why_not_factorised
from lamina.engine.init.olora import olora
from lamina.engine.init.pissa import NAMES as PISSA_NAMES
from lamina.engine.init.pissa import pissa
from lamina.engine.init.standard import as_made, gaussian, kaiming, random
from lamina.errors import UnsupportedFieldError

__all__ = [
    "Begun",
    "Fault",
    "Initialisation",
    "as_made",
    "changes_base",
    "initialisation",
    "register",
]

# An embedding begins as ever under these: peft lets it be targeted along with linear layers.
_LINEAR = ("linear", "embedding")

_METHODS: dict[bool | str, Initialisation] = {
    True: Initialisation(kaiming),
    "gaussian": Initialisation(gaussian),
    False: Initialisation(random),
    PISSA_NAMES: Initialisation(
        pissa, changes_base=True, kinds=_LINEAR, why_not=why_not_factorised("PiSSA")
    ),
    "olora": Initialisation(
        olora, changes_base=True, kinds=_LINEAR, why_not=why_not_factorised("OLoRA", dense=False)
    ),
    "corda": Initialisation(corda.corda, changes_base=True, kinds=_LINEAR, why_not=corda.why_not),
    "lora_ga": Initialisation(
        loraga.lora_ga,
        changes_base=True,
        kinds=("linear", "embedding", "conv"),
        why_not=loraga.why_not,
    ),
    "loftq": Initialisation(
        loftq.loftq, changes_base=True, kinds=("linear",), why_not=loftq.why_not, low_rank=False
    ),
    "eva": Initialisation(eva, kinds=_LINEAR),
    "orthogonal": Initialisation(orthogonal.orthogonal, kinds=_LINEAR, why_not=orthogonal.why_not),
    "mica": Initialisation(mica.mica, kinds=_LINEAR, why_not=mica.why_not),
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
        f"init_lora_weights={name!r} is not an initialisation that Lamina has. "
        f"Unknown initialization init_lora_weights={name!r}.",
        cure=f"use one of {names}",
    )


def changes_base(name: bool | str) -> bool:
    """Whether adapters that begin so change the base's weight."""
    return initialisation(name).changes_base
