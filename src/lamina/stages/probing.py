"""What the model of a stage answers, for the record: as it is saved, and its base alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lamina.checkpoint.probe import make_probe
from lamina.checkpoint.record import Probe
from lamina.engine.state import AdapterState
from lamina.errors import ProbeError
from lamina.model import PeftModel


def probe_of(
    model: PeftModel, adapters: Sequence[str], saved_modules: Sequence[str]
) -> tuple[Probe | None, ProbeError | None]:
    """What a model answers with these adapters, and why there is nothing to tell.

    Both are None for a model that doesn't take tokens. Where the head of a task is trained whole,
    the base alone isn't asked: its own head is drawn at random whenever it is loaded.

    Args:
        model: the adapted model.
        adapters: those of the chain, oldest first, whichever are active now.
        saved_modules: the modules that are trained whole.
    """
    heads = type(model).task_heads
    own_head = any(module.rpartition(".")[2].endswith(heads) for module in saved_modules if heads)
    try:
        with active(model.adapter_state, adapters):
            return make_probe(model, with_base=not own_head), None
    except ProbeError as error:
        return None, error


@contextmanager
def active(state: AdapterState, adapters: Sequence[str]) -> Iterator[None]:
    """Exactly these adapters take part in the forward for a while; what was is restored."""
    if state.active == tuple(adapters) and not state.disabled and not state.overridden:
        yield
        return
    before, disabled = state.active, state.disabled
    told = [(m, m.override) for m in state.members if m.override is not None]
    state.disabled = False
    state.activate(adapters)
    try:
        yield
    finally:
        state.disabled = disabled
        state.activate(before)
        for member, override in told:
            state.override(member, override)
