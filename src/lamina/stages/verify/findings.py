"""Collect what is found, in the order of looking; say it in the order of likelihood."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamina.stages.verify.report import Cause, Check, Kind

# What is certain comes before what is only likely.
_ORDER: tuple[Kind, ...] = (
    "damaged record",
    "incomplete file",
    "changed config",
    "not finite",
    "base already merged",
    "another base",
    "adapter scaled",
    "adapter not applied",
    "other stages",
    "not loadable",
    "another tokenizer",
    "another chat template",
    "quantisation",
    "dtype",
    "changed weights",
    "unknown",
)
_OF_WEIGHTS = {
    "incomplete file",
    "not finite",
    "adapter scaled",
    "adapter not applied",
    "other stages",
}
_OF_CONFIG: tuple[Kind, ...] = ("not loadable", "adapter scaled", "other stages", "unknown")


@dataclass
class Findings:
    """The checks, causes and notes of a verification that is under way."""

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _causes: list[Cause] = field(default_factory=list)

    def passed(self, name: str, detail: str) -> None:
        """Something is as it should be."""
        self.checks.append(Check(name, "passed", detail))

    def failed(self, name: str, detail: str) -> None:
        """Something isn't."""
        self.checks.append(Check(name, "failed", detail))

    def unchecked(self, name: str, why: str) -> None:
        """Something couldn't be looked at."""
        self.checks.append(Check(name, "not checked", why))

    def blame(self, *causes: Cause) -> None:
        """Name causes."""
        self._causes += causes

    def blames(self, *kinds: Kind) -> bool:
        """Whether one of these causes was named."""
        return any(cause.kind in kinds for cause in self._causes)

    @property
    def causes(self) -> tuple[Cause, ...]:
        """The causes, likeliest first, each kind once."""
        first = {cause.kind: cause for cause in reversed(self._causes)}
        if first.keys() & _OF_WEIGHTS:
            # Then it is known what has been changed.
            first.pop("changed weights", None)
        if "changed config" in first:
            # Whatever comes out with it.
            for kind in _OF_CONFIG:
                first.pop(kind, None)
        if "base already merged" in first:
            first.pop("another base", None)
        return tuple(sorted(first.values(), key=lambda cause: _ORDER.index(cause.kind)))
