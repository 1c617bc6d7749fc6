"""Whether every stage of a plan can be begun on the ones before, and whether its head is there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lamina.errors import LaminaError
from lamina.stages.rehearse import StageToBe, rehearse
from lamina.training.plan import Plan
from lamina.training.plan.document import Document, Fault
from lamina.training.preflight.base import Base
from lamina.training.preflight.places import place_of
from lamina.training.preflight.targets import Adapter, placed
from lamina.training.trainers import METHODS


def faults_of_chain(
    plan: Plan, document: Document, base: Base, adapters: list[Adapter]
) -> Iterator[Fault]:
    """The first stage that `begin_stage` would refuse, on a base without weights."""
    chain = []
    for stage, adapter in zip(plan.stages, adapters, strict=True):
        head = METHODS[plan.settings_of(stage).method or "sft"].head
        chain.append(
            StageToBe(
                name=stage.name,
                mode=stage.mode,
                config=None if stage.mode == "continue" else adapter.config,
                task="SEQ_CLS" if head == "reward" else "CAUSAL_LM",
                base=partial(base.empty, head),
            )
        )
    for number, error in rehearse(chain):
        yield from _told(document, number, error)


def _told(document: Document, number: int, error: LaminaError) -> Iterator[Fault]:
    if not error.faults:
        where = place_of(document, number, "mode")
        yield (where if where in document.lines else ("stages", number)), error.what.rstrip(".")
        return
    for told in error.faults[:1]:
        where, said = placed(document, number, told)
        whole = where[-1] == number
        yield where, f"{error.what.rstrip('.')}: {said}" if whole else said
