"""How one case is measured: both libraries in turn, several times, the median told."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

# What a side of a case does: one measurement, in the case's unit.
Side = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: what is measured.
        unit: of the values; less is better.
        prepare: makes the side of a library; what it does isn't measured.
        repeats: measurements of each side. If there are several, one more comes before them and
            doesn't count.
    """

    name: str
    unit: str
    prepare: Callable[[ModuleType], Side]
    repeats: int


@dataclass(frozen=True)
class Result:
    """The samples of a case by library."""

    name: str
    unit: str
    samples: dict[str, list[float]]

    def median(self, library: str) -> float:
        return statistics.median(self.samples[library])

    @property
    def ratio(self) -> float:
        """Peft / lamina: how many times less Lamina takes."""
        return self.median("peft") / max(self.median("lamina"), 1e-9)


def measure(case: Case, libraries: dict[str, ModuleType]) -> Result:
    """Run a case; the library that begins changes with each round."""
    sides = {name: case.prepare(library) for name, library in libraries.items()}
    samples: dict[str, list[float]] = {name: [] for name in libraries}
    warm_ups = int(case.repeats > 1)
    for round_ in range(case.repeats + warm_ups):
        order = list(sides) if round_ % 2 else list(reversed(sides))
        for name in order:
            gc.collect()
            value = sides[name]()
            if round_ >= warm_ups:
                samples[name].append(value)
    return Result(case.name, case.unit, samples)


def timed(call: Callable[[], object], times: int = 1) -> float:
    """Milliseconds that a call takes, the mean of `times`."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return 1000 * (time.perf_counter() - began) / times
