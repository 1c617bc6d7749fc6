"""Find the tables whose rows an adapter replaces (`trainable_token_indices`). Touches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lamina.config import LoraConfig
from lamina.engine.names import Place, suffixes
from lamina.engine.ties import input_embedding, sharing, tied_to_embedding


@dataclass(frozen=True)
class TokenPlan:
    """One table: the plain name of its module, the rows to replace, whose rows it takes instead."""

    name: str
    indices: tuple[int, ...]
    tied_to: str | None = None


def find_tokens(
    model: nn.Module, everything: Sequence[Place], config: LoraConfig, saved: Iterable[str]
) -> tuple[list[TokenPlan], list[str]]:
    """(plans, each table's own before those tied to it; faults)."""
    asked = config.trainable_token_indices
    if not asked:
        return [], []
    if not isinstance(asked, Mapping):
        asked = {input_embedding(model, everything) or "embed_tokens": asked}
    hits: dict[str, TokenPlan] = {}
    faults = []
    for target, indices in asked.items():
        found = [p for p in everything if p.name and target in suffixes(p.name)]
        if not found:
            missing = f"Target modules {{{target!r}}} not found in the base model."
            faults.append(f"trainable_token_indices: {missing}")
        for place in found:
            faults += _faults_of(place, indices, saved)
            hits[place.name] = TokenPlan(place.name, tuple(indices))
    if not faults:
        hits, faults = _tied(model, everything, config, hits)
    order = sorted(hits.values(), key=lambda plan: plan.tied_to is not None)
    return order, faults


def _faults_of(place: Place, indices: Any, saved: Iterable[str]) -> list[str]:
    name, module = place.name, place.original
    if name in saved:
        what = "is already marked to be trained fully, by modules_to_save"
        return [f"trainable_token_indices: The embedding layer {what}: {name}"]
    if len(getattr(place.module, "modules_to_save", ())):
        return [f"trainable_token_indices: another adapter trains {name} whole"]
    if not isinstance(module, (nn.Embedding, nn.Linear)):
        return [f"trainable_token_indices: {name} is a {type(module).__name__}, not a table"]
    rows = module.weight.shape[0]
    wrong = [i for i in indices if not isinstance(i, int) or not 0 <= i < rows]
    faults = [f"trainable_token_indices: {name} has {rows} rows, not {wrong[:8]}"] if wrong else []
    if len(set(indices)) != len(indices):
        faults.append(f"trainable_token_indices: {name} has some index twice")
    return faults


def _tied(
    model: nn.Module, everything: Sequence[Place], config: LoraConfig, hits: dict[str, TokenPlan]
) -> tuple[dict[str, TokenPlan], list[str]]:
    """The hits with ties: modules that share a table share its rows."""
    embedding = tied_to_embedding(model, everything)
    faults = []
    for group in sharing(everything):
        names = [place.name for place in group]
        if set(embedding) & set(names):
            names = [*embedding]
        elif _untied(model):
            continue
        here = [hits[name] for name in names if name in hits]
        if len({plan.indices for plan in here}) > 1:
            if config.ensure_weight_tying:
                told = ", ".join(f"{plan.name}: {list(plan.indices)}" for plan in here)
                faults.append(
                    "Cannot ensure weight tying when different token indices are specified for "
                    f"tied layers: {told}"
                )
            continue
        if names[0] in hits and names[0] in embedding:
            hits.update({n: replace(hits[names[0]], name=n, tied_to=names[0]) for n in names[1:]})
        elif len(here) > 1:
            first = here[0]
            hits.update({p.name: replace(p, tied_to=first.name) for p in here[1:]})
    return hits, faults


def _untied(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False
