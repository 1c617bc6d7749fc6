"""What trains in a model, in one line, and why nothing does if so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamina.engine.fold import folded_adapters

if TYPE_CHECKING:
    from lamina.model.facade import PeftModel


def trainable_summary(model: PeftModel) -> str:
    """The line that `print_trainable_parameters` prints; two lines if nothing trains."""
    trainable, total = model.get_nb_trainable_parameters()
    share = 100 * trainable / total if total else 0.0
    line = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
    reasons = [] if trainable else why_nothing_trains(model)
    return "\n".join([line, *(f"Nothing trains: {reason}" for reason in reasons)])


def why_nothing_trains(model: PeftModel) -> list[str]:
    """The reasons, each with its cure; empty if no adapter is to blame."""
    state = model.adapter_state
    reasons = []
    frozen = [name for name in state.active if name not in state.trainable]
    idle = [name for name in state.configs if name in state.trainable - set(state.active)]
    if frozen:
        reasons.append(
            f"{_list(frozen)} is frozen, as an adapter is that was loaded without "
            "is_trainable=True; load it with is_trainable=True, or "
            f"model.set_adapter({list(state.active)!r}, train={frozen!r})"
        )
    if idle:
        reasons.append(
            f"{_list(idle)} is trainable but not active; "
            f"model.set_adapter({[*state.active, *idle]!r}, train={idle!r})"
        )
    folded = [name for name in folded_adapters(model) if name in state.trainable]
    if folded:
        reasons.append(f"{_list(folded)} is folded into the base; model.unmerge_adapter()")
    return reasons


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names))
