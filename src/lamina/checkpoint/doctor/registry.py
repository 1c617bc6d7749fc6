"""The checks, and how they are run: each on what it asks for, if that could be read.

A check is a function whose parameters are named after attributes of `Evidence`. It is called with
their values, and passed over where one of them is None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lamina.checkpoint.doctor.evidence import Evidence
from lamina.checkpoint.doctor.findings import Finding

Check = Callable[..., Iterable[Finding]]

# What a check misses -> how that is told; the first that is missing is the reason.
_MISSING = {
    "entries": "the directory can't be read",
    "config": "adapter_config.json can't be read",
    "tensors": "the weights can't be read",
    "settings": "the config is refused",
    "contents": "config or weights can't be read",
    "record": None,
    "measures": "the values were not read",
    "base": None,
}


@dataclass(frozen=True)
class Registered:
    """A check and the attributes of `Evidence` that it asks for."""

    check: Check
    needs: tuple[str, ...]

    @property
    def topic(self) -> str:
        """What it looks at: the first line of its docstring, without the period."""
        lines = (self.check.__doc__ or self.check.__name__).strip().splitlines()
        return lines[0].rstrip(".")


_CHECKS: list[Registered] = []
# The modules of the checks, in the order in which their findings are told.
_TOLD = ("files", "names", "settings", "values", "chain", "against_base", "serving")


def check(function: Check) -> Check:
    """Register a check."""
    _CHECKS.append(Registered(function, tuple(inspect.signature(function).parameters)))
    return function


def registered() -> list[Registered]:
    """All checks, in the order in which they run."""
    return sorted(_CHECKS, key=lambda each: _TOLD.index(each.check.__module__.rpartition(".")[2]))


def run_checks(evidence: Evidence) -> tuple[list[Finding], list[str]]:
    """(findings, what could not be checked) of all checks; none of them stops the others."""
    findings: list[Finding] = []
    unchecked: dict[str, list[str]] = {}
    for each in registered():
        values: dict[str, Any] = {name: getattr(evidence, name) for name in each.needs}
        missing = [name for name, value in values.items() if value is None]
        if missing:
            reason = _MISSING.get(missing[0])
            if reason is not None:
                unchecked.setdefault(reason, []).append(each.topic)
            continue
        try:
            findings += each.check(**values)
        except Exception as error:
            if evidence.settings is None:
                # That its values are of wrong kinds is told already.
                unchecked.setdefault(_MISSING["settings"] or "", []).append(each.topic)
            else:
                findings.append(_failed(each, error))
    return findings, [f"{reason}: {'; '.join(topics)}" for reason, topics in unchecked.items()]


def _failed(each: Registered, error: Exception) -> Finding:
    """What becomes of an exception: files that are broken in a way that no check foresaw."""
    said = " ".join(str(error).split())[:200]
    return Finding(
        "error",
        "check-failed",
        f"Could not be checked: {each.topic}; {type(error).__name__}: {said}",
        cure="something in the files is not of the form that it has to be; save or download the "
        "adapter again",
    )
