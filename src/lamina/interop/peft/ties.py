"""What peft refuses and warns of where weights are shared, and where parameters are adapted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lamina.config.expressions import fullmatch
from lamina.engine.names import places
from lamina.engine.ties import tied_to_embedding
from lamina.errors import TargetError
from lamina.interop.peft.constants import EMBEDDING_LAYER_NAMES


def refuse_other_parameters(config: Any, others: Mapping[str, Any]) -> None:
    """Raise if another adapter adapts other parameters by themselves.

    Raises:
        ValueError: one does.
    """
    mine = set(config.target_parameters or ())
    for name, other in others.items() if mine else ():
        theirs = set(other.target_parameters or ())
        if other is not config and theirs and theirs != mine:
            raise ValueError(
                f"With target_parameters, all adapters must target the same set of parameters: "
                f"{name!r} has {sorted(theirs)}, the new one {sorted(mine)}."
            )


def warn_of_ties(model: nn.Module, config: Any) -> None:
    """Warn of an adapter on one of several modules that share a weight."""
    if config.ensure_weight_tying or not _names_embedding(config):
        return
    if tied_to_embedding(model, list(places(model))):
        warnings.warn(
            "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
            "`ensure_weight_tying` is not set to True: the tied layers will differ.",
            stacklevel=4,
        )


def tell_untied(model: Any) -> None:
    """Let a merged model's config say so, if its embedding and head have different weights."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    getters = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    try:
        ends = [getter() if callable(getter) else None for getter in getters]
    except (NotImplementedError, AttributeError):
        return
    weights = [getattr(end, "weight", None) for end in ends]
    first, second = weights
    if first is None or second is None:
        return
    if first.data_ptr() != second.data_ptr():
        config.tie_word_embeddings = False
        warnings.warn(
            "The embedding and the head differ after merging. Setting `tie_word_embeddings=False` "
            "in the model's config.",
            stacklevel=4,
        )


def _names_embedding(config: Any) -> bool:
    targets = config.target_modules
    if isinstance(targets, str):
        named = any(fullmatch(targets, name) for name in EMBEDDING_LAYER_NAMES)
    else:
        named = any(t.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for t in targets or ())
    saved = config.modules_to_save or ()
    return named or any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in saved)


@contextmanager
def told_shortly() -> Iterator[None]:
    """A single fault of a plan becomes the whole message, as in peft."""
    try:
        yield
    except TargetError as error:
        if len(error.faults) != 1:
            raise
        raise type(error)(error.faults[0]) from error
