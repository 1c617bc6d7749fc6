"""Whether a stage cost the evals more than its gate allows; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lamina.training.evaluate.scores import Judged, Score
from lamina.training.plan.settings import Gate

# Two measurements of one model on one machine are this near, whatever the share allows.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Verdict:
    """What a gate says of a stage.

    Attributes:
        faults: a sentence for every bound that was broken; none if the stage passes.
        told: one for every bound that was kept.
    """

    faults: tuple[str, ...]
    told: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no bound was broken."""
        return not self.faults


def verdict(gate: Gate | None, before: Judged | None, after: Judged) -> Verdict:
    """Compare a stage with the one that it was built on.

    A score s is worse than the one before, s', by the share (s - s') / |s'| where lower is better,
    by (s' - s) / |s'| where higher is. What was not measured before, or can't be now, can't pass.

    Args:
        gate: of the stage; everything passes where there is none.
        before: of the stage that this one was built on, or of the base.
        after: of the stage.
    """
    faults: list[str] = []
    told: list[str] = []
    for name, allowed in (gate.may_lose if gate else _NOTHING).items():
        one, other = before.score(name) if before else None, after.score(name)
        if one is None or other is None:
            faults.append(f"{name}: it can't be compared: {_unmeasured(one, other)}")
            continue
        lost = other.worse_by(one)
        sentence = f"{name}: {_change(one, other, lost)}; {_bound(allowed)}"
        (faults if lost > allowed + _ROUNDING else told).append(sentence)
    return Verdict(tuple(faults), tuple(told))


_NOTHING: Mapping[str, float] = {}


def _unmeasured(before: Score | None, after: Score | None) -> str:
    missing = [when for when, score in (("before", before), ("after", after)) if score is None]
    return f"it wasn't measured {' and '.join(missing)} the stage"


def _change(before: Score, after: Score, lost: float) -> str:
    way = "worse" if lost > 0 else "better" if lost < 0 else "the same"
    share = f" by {abs(lost):.1%}" if lost else ""
    return f"{after.metric} {before.value:.4g} -> {after.value:.4g}, {way}{share}"


def _bound(allowed: float) -> str:
    if allowed < 0:
        return f"it has to get better by {-allowed:.1%}"
    return f"it may lose {allowed:.1%}" if allowed else "it may not get worse"
