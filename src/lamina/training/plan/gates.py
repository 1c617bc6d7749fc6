"""What must hold of gates: that they can be measured, and that a plan can go on behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lamina.training.plan.document import Fault, Where
from lamina.training.plan.messages import hint

_OF_RETRIES = ("retry_factor", "max_retries")


def faults_of_gates(stages: Sequence[Any], defaults: dict[str, Any], evals: Any) -> Iterator[Fault]:
    """Everything that is wrong with the gates of all stages, on values as they are written.

    Args:
        stages: of the plan, in their order.
        defaults: which may have a gate of all stages.
        evals: of the plan.
    """
    known = evals if isinstance(evals, dict) else {}
    chain = [each if isinstance(each, dict) else {} for each in stages]
    for place, stage in enumerate(chain):
        where, gate = _gate(place, stage, defaults)
        yield from _of_bounds(where, gate, stage, defaults, known)
        failure = gate.get("on_failure", "stop")
        for key in _OF_RETRIES:
            if gate.get(key) is not None and failure != "retry":
                yield (*where, key), f"means nothing to {failure}; it is for on_failure: retry"
        if failure == "rollback":
            yield from _of_references(where, stage, chain[place + 1 :])
    yield from _of_parents(chain, defaults)


def _gate(place: int, stage: dict[str, Any], defaults: dict[str, Any]) -> tuple[Where, Any]:
    own: Any = stage.get("gate")
    if own is not None:
        return ("stages", place, "gate"), own if isinstance(own, dict) else {}
    shared = defaults.get("gate")
    return ("defaults", "gate"), shared if isinstance(shared, dict) else {}


def _of_bounds(
    where: Where,
    gate: dict[str, Any],
    stage: dict[str, Any],
    defaults: dict[str, Any],
    evals: dict[str, Any],
) -> Iterator[Fault]:
    bounds = gate.get("may_lose")
    for name in bounds if isinstance(bounds, dict) else ():
        place = (*where, "may_lose", name)
        if name not in evals:
            yield place, f"there is no eval {name!r}{hint(name, evals)}"
        elif _method(stage, defaults) == "reward" and not _is_accuracy(evals[name]):
            told = "a reward model gives one number, of which only accuracy can be measured"
            yield place, f"{told}: stage {stage.get('name')!r} can't pass this"


def _is_accuracy(asked: Any) -> bool:
    return isinstance(asked, dict) and asked.get("metric") == "accuracy"


def _of_references(
    where: Where, stage: dict[str, Any], later: Sequence[dict[str, Any]]
) -> Iterator[Fault]:
    for other in later:
        if stage.get("name") is not None and other.get("reference") == stage["name"]:
            told = f"is the reference of {other.get('name')!r}, which would have none"
            yield (*where, "on_failure"), f"{stage['name']!r} {told}: stop or retry"
            return


def _of_parents(chain: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> Iterator[Fault]:
    """Stages that continue what may have been rolled back."""
    for place, stage in enumerate(chain):
        if stage.get("mode") != "continue" or not place:
            continue
        parents = _parents(chain, place, defaults)
        where, _ = _gate(place - 1, chain[place - 1], defaults)
        if None in parents:
            told = "would have nothing to continue if what is before it is rolled back"
            yield (*where, "on_failure"), f"{stage.get('name')!r} {told}: stop or retry"
        elif _method(stage, defaults) == "reward" and any(
            _method(parent or {}, defaults) != "reward" for parent in parents[1:]
        ):
            told = "would continue a model without its head if what is before it is rolled back"
            yield (*where, "on_failure"), f"{stage.get('name')!r} {told}: stop or retry"


def _parents(
    chain: Sequence[dict[str, Any]], place: int, defaults: dict[str, Any]
) -> list[dict[str, Any] | None]:
    """What a stage may be built on, likeliest first; None is the base."""
    found: list[dict[str, Any] | None] = []
    for before in range(place - 1, -1, -1):
        found.append(chain[before])
        _, gate = _gate(before, chain[before], defaults)
        if gate.get("on_failure") != "rollback":
            return found
    return [*found, None]


def _method(stage: dict[str, Any], defaults: dict[str, Any]) -> Any:
    return stage.get("method", defaults.get("method"))
