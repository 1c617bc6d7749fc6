"""What a dry run of a plan has found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lamina.errors import PlanError


@dataclass(frozen=True)
class DataReport:
    """The data of a stage.

    Attributes:
        formats: how each source is laid out.
        examples: how many there are to train on; None where that shows in reading only.
    """

    formats: tuple[str, ...]
    examples: int | None


@dataclass(frozen=True)
class StageReport:
    """One stage as it would be run.

    Attributes:
        name: of the stage.
        mode: how it begins; "fresh" for the first.
        method: what it does.
        rank: of what it trains: its own, or its parent's under "continue".
        layers: how many layers that adapts; None if the targets are at fault.
        counts: pattern -> layers that it hits.
        trainable: parameters that train; None likewise.
        examples: to train on, where it is known.
        steps: optimizer steps, where they are known.
        formats: of its data.
    """

    name: str
    mode: str
    method: str
    rank: int
    layers: int | None
    counts: dict[str, int]
    trainable: int | None
    examples: int | None
    steps: int | None
    formats: tuple[str, ...]


@dataclass(frozen=True)
class Need:
    """What a run needs of memory or disk, in bytes.

    Attributes:
        what: "memory" or "disk".
        where: the device or folder.
        parts: what it is made up of.
        free: what is free there now; None if the system doesn't tell.
        total: what there is at all.
    """

    what: str
    where: str
    parts: dict[str, int]
    free: int | None
    total: int | None

    @property
    def bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class PlanReport:
    """All stages, and everything that keeps the plan from being run.

    Attributes:
        source: the plan's file.
        base: the model's name.
        base_class: its class; None if it can't be opened.
        base_parameters: of all its weights.
        stages: in their order.
        needs: of memory and disk, at their highest.
        faults: what is wrong, by lines.
        notes: what may be meant, and may not.
    """

    source: str
    base: str
    base_class: str | None
    base_parameters: int | None
    stages: tuple[StageReport, ...]
    needs: tuple[Need, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ready(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def check(self) -> None:
        """Do nothing if the plan can be run.

        Raises:
            PlanError: with all faults, if it can't.
        """
        if self.faults:
            count = f"{len(self.faults)} fault" + ("s" if len(self.faults) != 1 else "")
            raise PlanError(
                f"{self.source} can't be run: {count}.",
                faults=self.faults,
                cure="mend these; nothing has been begun",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        needs = [{**dataclasses.asdict(each), "bytes": each.bytes} for each in self.needs]
        return {**dataclasses.asdict(self), "needs": needs, "ready": self.ready}
