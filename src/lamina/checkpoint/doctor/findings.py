"""What an examination of an adapter directory finds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing, and what mends it.

    Attributes:
        severity: "error" (it can't be used, or computes something else than it should), "warning"
            (it is likely not what was meant, or fails with some readers), "note" (it works; to be
            known before it is handed on).
        code: what it is, in words joined by hyphens; stays the same from release to release.
        what: one sentence.
        where: the tensors, modules, files or fields that it is about, all of them.
        cure: the call, command or step that mends it.
    """

    severity: Severity
    code: str
    what: str
    where: tuple[str, ...] = ()
    cure: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "severity": self.severity,
            "code": self.code,
            "what": self.what,
            "where": list(self.where),
            "cure": self.cure,
        }


@dataclass(frozen=True)
class Examination:
    """All findings on one adapter directory, the worst first.

    Attributes:
        path: the directory, as it was given.
        base: the base model that it was compared with; None if none was given.
        findings: errors, then warnings, then notes; each in the order of the checks.
        unchecked: what could not be looked at, and why, a line each.
    """

    path: str
    base: str | None
    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def worst(self) -> Severity | None:
        """The severity of the worst finding; None if there is none."""
        return self.findings[0].severity if self.findings else None

    @property
    def healthy(self) -> bool:
        """Whether there is nothing above a note."""
        return self.worst in (None, "note")

    @property
    def counts(self) -> dict[str, int]:
        """Severity -> how many findings have it."""
        counted = Counter(finding.severity for finding in self.findings)
        return {severity: counted[severity] for severity in SEVERITIES}

    def codes(self, severity: Severity | None = None) -> list[str]:
        """The codes of the findings, of one severity or all."""
        return [f.code for f in self.findings if severity in (None, f.severity)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "path": self.path,
            "base": self.base,
            "healthy": self.healthy,
            "counts": self.counts,
            "findings": [finding.to_dict() for finding in self.findings],
            "unchecked": list(self.unchecked),
        }


def by_severity(findings: list[Finding]) -> tuple[Finding, ...]:
    """The findings, worst first; those of one severity stay in their order."""
    return tuple(sorted(findings, key=lambda each: SEVERITIES.index(each.severity)))
