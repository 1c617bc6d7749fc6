"""The linear layers of a model, and its output head."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lamina.engine.bypassed import why_bypassed
from lamina.engine.layers import is_linear
from lamina.engine.names import Place, unadapted, within

# Heads that are not a language model's, by the names that transformers gives them.
_HEADS = ("score", "classifier", "qa_outputs", "lm_head", "embed_out")


def linear_names(
    everything: Iterable[Place], model: nn.Module, *, include_head: bool = False
) -> list[str]:
    """Plain names of all linear layers, by default without the output head."""
    everything = list(everything)
    heads = set() if include_head else head_names(everything, model)
    attention = {p.name for p in everything if isinstance(p.original, nn.MultiheadAttention)}
    return [
        place.name
        for place in everything
        if place.name
        and is_linear(place.original)
        and not any(within(place.name, head) for head in heads)
        and place.name.rpartition(".")[0] not in attention
        and why_bypassed(model, place.name) is None
    ]


def head_names(everything: Iterable[Place], model: nn.Module) -> set[str]:
    """Plain names of the output head: what the model calls so, or what is called so usually."""
    everything = list(everything)
    getter = getattr(unadapted(model), "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is not None:
        return {p.name for p in everything if p.module is head or p.original is head}
    roots = _roots(everything)
    return {f"{root}{name}" for root in roots for name in _HEADS}


def _roots(everything: list[Place]) -> set[str]:
    # A head hangs on the model itself, which may sit inside a wrapper (`base_model.model`).
    return {"", "model.", "base_model.model."} & {
        "",
        *(f"{place.name}." for place in everything if place.name in ("model", "base_model.model")),
    }
